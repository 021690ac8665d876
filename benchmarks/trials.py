"""Codes for differences that were tried for the table of losses and are not in the package.

Each gives what the receiver has of a tensor, and the bytes that a message would take.
"""

import math
from collections.abc import Callable

import torch

_BLOCK = 128


def one_bit(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Signs, and one bfloat16 mean size for a block of 128: 1.125 bits a weight.

    Formula: Seide et al., 1-bit stochastic gradient descent, Interspeech 2014, with one mean a block.
    """
    flat = values.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
    means = blocks.abs().mean(dim=1, keepdim=True).to(torch.bfloat16).float()
    sent = torch.where(blocks < 0, -means, means).view(-1)[: flat.numel()].view(values.shape)
    return sent, -(-flat.numel() // 8) + 2 * len(blocks)


def whole(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """All values as they are."""
    return values, values.nbytes


def largest(share: float) -> Callable[[torch.Tensor], tuple[torch.Tensor, int]]:
    """The largest `share` of a tensor's values as signs and one of two sizes; positions cost their entropy.

    Formula: Aji and Heafield, https://arxiv.org/abs/1704.05021, one threshold a tensor; the two sizes are the
    means below and above the mean of those that are sent.
    """

    def code(values: torch.Tensor) -> tuple[torch.Tensor, int]:
        flat = values.reshape(-1)
        count = max(1, round(share * flat.numel()))
        positions = flat.abs().topk(count, sorted=False).indices
        sent = torch.zeros_like(flat)
        sent[positions] = _two_sizes(flat[positions])
        return sent.view(values.shape), math.ceil((_bits_of_choice(flat.numel(), count) + 2 * count) / 8) + 8

    return code


def _two_sizes(values: torch.Tensor) -> torch.Tensor:
    sizes = values.abs()
    is_large = sizes > sizes.mean()
    large, small = sizes[is_large].mean().nan_to_num(), sizes[~is_large].mean()
    return torch.where(is_large, large, small) * values.sign()


def _bits_of_choice(total: int, count: int) -> float:
    """Bits that tell which `count` of `total` there are."""
    logs = math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1)
    return logs / math.log(2)


TRIALS = {
    "all": whole,
    "one bit": one_bit,
    "largest 5 %": largest(0.05),
    "largest 1 %": largest(0.01),
}
SPARSE = ("largest 5 %", "largest 1 %")
