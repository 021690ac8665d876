"""Codes for differences that were tried for the table of losses and are not in the package.

Each gives what the receiver has of a tensor, and the bytes that a message would take.
"""

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


def largest(share: float) -> Callable[[torch.Tensor], tuple[torch.Tensor, int]]:
    """The largest `share` of a tensor's values in bfloat16, with the positions as 32-bit integers.

    Formula: Aji and Heafield, https://arxiv.org/abs/1704.05021, one threshold a tensor.
    """

    def code(values: torch.Tensor) -> tuple[torch.Tensor, int]:
        flat = values.reshape(-1)
        count = max(1, round(share * flat.numel()))
        positions = flat.abs().topk(count, sorted=False).indices
        sent = torch.zeros_like(flat)
        sent[positions] = flat[positions].to(torch.bfloat16).float()
        return sent.view(values.shape), 6 * count

    return code


TRIALS = {"one bit": one_bit, "largest 5 %": largest(0.05)}
