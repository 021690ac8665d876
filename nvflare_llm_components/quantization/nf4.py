"""``nf4``: blockwise NormalFloat of 4 bits, two weights a byte, with 8-bit scales of scales.

The 16 levels are the quantiles of a Gaussian of QLoRA (https://arxiv.org/abs/2305.14314, appendix E). A
block's scale is a byte, see :mod:`.scales`.

Error of a weight: at most 0.153 of its block's scale, plus 1/128 of the largest weight of its block, plus
1/255 of the largest weight of its 256 blocks. A relative error of 0.092 on Gaussian weights at the default
block of 64, at 4.127 bits a weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nvflare_llm_components.quantization.packed import PackedCodec, ToCodes
from nvflare_llm_components.quantization.scales import over

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_GRID = 1024  # a scaled weight is rounded to a multiple of 1 / _GRID, then looked up
_HEADROOM = 127 / 128  # clipping a block's largest weight a little serves its other weights


@dataclass(frozen=True)
class NF4Codec(PackedCodec):
    """Blockwise NormalFloat, two weights a byte; see :class:`.packed.PackedCodec` for the payload."""

    name: str = "nf4"
    bits: int = 4
    moved_as: ClassVar[torch.dtype] = torch.float64

    def levels(self) -> torch.Tensor:
        """See :class:`.packed.PackedCodec`."""
        return torch.tensor(LEVELS, dtype=torch.float32)

    def scales_of(self, magnitudes: torch.Tensor, absmax: torch.Tensor, num_weights: int) -> torch.Tensor:
        """See :class:`.packed.PackedCodec`."""
        return absmax * _HEADROOM

    def to_codes(self, device: torch.device) -> ToCodes:
        """See :class:`.packed.PackedCodec`."""
        table = _encode_table(device)

        def codes(blocks: torch.Tensor, scales: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
            torch.mul(blocks, over(_GRID, scales).unsqueeze(1), out=scratch)
            scratch.round_().clamp_(-_GRID, _GRID).add_(_GRID)
            return table.index_select(0, scratch.view(-1).to(torch.int32))

        return codes

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """See :class:`.packed.PackedCodec`."""
        words = codes.view(torch.int16)
        return (words | (words >> 4)).to(torch.uint8)


def _encode_table(device: torch.device) -> torch.Tensor:
    """Code of the level nearest to ``i / _GRID - 1`` for i from 0 to 2 * _GRID."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    borders = (levels[:-1] + levels[1:]) / 2
    grid = torch.arange(-_GRID, _GRID + 1, dtype=torch.float64) / _GRID
    return torch.bucketize(grid, borders).to(torch.uint8).to(device)
