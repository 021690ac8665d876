"""``int2``: four levels for a block of weights, four weights a byte, for differences.

The levels are those of the best quantizer of a Gaussian to four levels (Max 1960, Lloyd 1982), in parts of
the outer one. A block's scale, the outer level, is first that of a Gaussian with the block's mean magnitude,
then the one of least squares for the weights that this one puts outside, and never beyond the largest weight.

Error of a weight: at most 0.35 of its block's scale where it is below the scale. A relative error of 0.336 on
Gaussian weights at the default block of 64, at 2.127 bits a weight. For no block is the error as large as the
block itself, so that with error feedback nothing is lost for good; least squares halves what it carries of
updates that persist.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nvflare_llm_components.quantization.packed import PackedCodec, ToCodes
from nvflare_llm_components.quantization.scales import over

_INNER = 0.29977142  # 0.45278 / 1.51042
LEVELS = (-1.0, -_INNER, _INNER, 1.0)
_BORDER = (1 + _INNER) / 2
_SCALE_OF_MEAN = 1.89302  # outer level over mean magnitude of a Gaussian: 1.51042 * sqrt(pi / 2)
_GRID = 1024  # magnitudes are summed in 1 / _GRID of the largest: whole numbers, so the order does not matter


@dataclass(frozen=True)
class Int2Codec(PackedCodec):
    """Four levels a block, four weights a byte; see :class:`.packed.PackedCodec` for the payload."""

    name: str = "int2"
    bits: int = 2
    moved_as: ClassVar[torch.dtype] = torch.complex128

    def levels(self) -> torch.Tensor:
        """See :class:`.packed.PackedCodec`."""
        return torch.tensor(LEVELS, dtype=torch.float32)

    def scales_of(self, magnitudes: torch.Tensor, absmax: torch.Tensor, num_weights: int) -> torch.Tensor:
        """See :class:`.packed.PackedCodec`."""
        num, block_size = magnitudes.shape
        grid = magnitudes.mul_(over(_GRID, absmax).unsqueeze(1)).round_()
        counts = torch.full_like(absmax, block_size)
        counts[-1] = num_weights - (num - 1) * block_size
        sums = grid.sum(dim=1)
        guess = (sums / counts * _SCALE_OF_MEAN).clamp_(max=_GRID)
        is_outer = torch.gt(grid, (guess * _BORDER).unsqueeze(1), out=torch.empty_like(grid))
        num_outer = is_outer.sum(dim=1)
        sums_outer = is_outer.mul_(grid).sum(dim=1)
        # Least squares: sum of magnitude x level over that of level squared; 1 outside, _INNER inside.
        products = sums.mul_(_INNER).add_(sums_outer.mul_(1 - _INNER))
        squares = counts.mul_(_INNER**2).add_(num_outer.mul_(1 - _INNER**2))
        return absmax * products.div_(squares).clamp_(max=_GRID).mul_(1.0 / _GRID)

    def to_codes(self, device: torch.device) -> ToCodes:
        """See :class:`.packed.PackedCodec`."""

        def codes(blocks: torch.Tensor, scales: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
            torch.mul(blocks, over(1 / _BORDER, scales).unsqueeze(1), out=scratch)
            return scratch.view(-1).add_(2.0).clamp_(0.0, 3.0).to(torch.uint8)  # towards zero

        return codes

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """See :class:`.packed.PackedCodec`."""
        words = codes.view(torch.int32)
        words = words | (words >> 6)
        return (words | (words >> 12)).to(torch.uint8)
