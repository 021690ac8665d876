"""What one application of a filter cost: bytes, time, and the error it made."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from nvflare_llm_components.quantization.chunks import MadeValues
from nvflare_llm_components.quantization.codec import Codec, decode
from nvflare_llm_components.tensors.norm import squared_norm

_SAMPLE_OF_BLOCK = 1 << 14
_SAMPLE = 1 << 16  # weights of a tensor on which its error is measured: a whole number of nf4's superblocks


@dataclass
class Traffic:
    """What one application of a filter did, in bytes and errors.

    Attributes:
        num_params: tensors in the message.
        num_encoded: those among them that were encoded, not sent as they are.
        bytes_before: size before the application.
        bytes_after: size after it.
        bytes_by_precision: size on the wire by codec; ``raw`` is what travels as it is.
        num_saturated: finite weights beyond the range of their format.
        num_nonfinite: NaN and infinite weights of blockwise encoded tensors.
        seconds: wall time.
        error_energy: sum of squared errors, estimated.
        weight_energy: sum of squared weights, estimated.
    """

    num_params: int = 0
    num_encoded: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_by_precision: Counter[str] = field(default_factory=Counter)
    num_saturated: int = 0
    num_nonfinite: int = 0
    seconds: float = 0.0
    error_energy: float = 0.0
    weight_energy: float = 0.0

    @property
    def relative_error(self) -> float:
        """Norm of the error over the norm of the weights; 0 where there are no weights."""
        return math.sqrt(self.error_energy / self.weight_energy) if self.weight_energy else 0.0

    def count_error(self, weights: torch.Tensor, arrived: torch.Tensor, share: float = 1.0) -> None:
        """Add the error of weights of which all that arrives is known; those that are not finite don't count.

        Args:
            weights: flat, on the CPU.
            arrived: of the same shape.
            share: how many weights each of them stands for.
        """
        weight_energy = squared_norm(weights)
        if not math.isfinite(weight_energy):
            finite = weights.isfinite()
            weights, arrived = weights[finite], arrived[finite]
            weight_energy = squared_norm(weights)
        self.error_energy += share * squared_norm(arrived.float() - weights)
        self.weight_energy += share * weight_energy

    def count_sample(self, weights: MadeValues, part: slice, arrived: torch.Tensor) -> None:
        """Estimate the error of a block of a tensor on its first weights.

        Args:
            weights: of the whole tensor.
            part: the block.
            arrived: what arrives of it.
        """
        count = min(arrived.numel(), _SAMPLE_OF_BLOCK)
        if count:
            first = weights[slice(part.start, part.start + count)]
            self.count_error(first, arrived[:count], arrived.numel() / count)

    def measure_error(self, weights: torch.Tensor, codec: Codec, block_size: int | None) -> None:
        """Estimate the error on the first weights: a full decode would cost as much as encoding."""
        sample = weights.reshape(-1)[:_SAMPLE].float()
        if not sample.numel():
            return
        encoded = codec.encode(sample, block_size)
        decoded = decode(codec, encoded.payload, sample.numel(), block_size, encoded.num_nonfinite)
        self.count_error(sample.cpu(), decoded.cpu(), weights.numel() / sample.numel())
