"""``nf4``: blockwise NormalFloat of 4 bits, two weights a byte, with 8-bit scales of scales.

The 16 levels are the quantiles of a Gaussian of QLoRA (https://arxiv.org/abs/2305.14314, appendix E). A
block's scale is ``code * code * unit`` with an 8-bit code, and one float32 unit for 256 blocks: the square
gives a block a hundred times smaller than the largest its scale to 4 %, where a linear code would lose it.

Error of a weight: at most 0.153 of its block's scale, plus 1/128 of the largest weight of its block, plus
1/255 of the largest weight of its 256 blocks. A relative error of 0.092 on Gaussian weights at the default
block of 64, at 4.127 bits a weight.
"""

from dataclasses import dataclass

import torch

from nvflare_llm_components.quantization.blocks import (
    NONFINITE_BYTES,
    BlockReader,
    finished,
    multiply_blocks,
    num_blocks,
    put_nonfinite,
    split_nonfinite,
    view_section,
)
from nvflare_llm_components.quantization.chunks import chunks
from nvflare_llm_components.quantization.codec import Encoded

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
BLOCKS_PER_UNIT = 256  # a chunk holds whole units of every block size, so chunking never changes a byte
_MAX_CODE = 255
_GRID = 1024  # a scaled weight is rounded to a multiple of 1 / _GRID, then looked up
_MIN_UNIT = 2.0**-116  # so that _GRID / scale is finite
_HEADROOM = 127 / 128  # clipping a block's largest weight a little serves its other weights
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class NF4Codec:
    """Blockwise NormalFloat.

    Payload: non-finite positions and values, units (float32, one for 256 blocks), scale codes (uint8, one a
    block), codes (two a byte, the earlier weight in the low half).
    """

    name: str = "nf4"
    bits: int = 4
    default_block_size: int = 64

    def num_payload_bytes(self, num_weights: int, block_size: int | None, num_nonfinite: int) -> int:
        """See :class:`.codec.Codec`."""
        num_scales = num_blocks(num_weights, block_size or self.default_block_size)
        scales = 4 * num_blocks(num_scales, BLOCKS_PER_UNIT) + num_scales
        return NONFINITE_BYTES * num_nonfinite + scales + num_blocks(num_weights, 2)

    def encode(self, weights: torch.Tensor, block_size: int | None) -> Encoded:
        """See :class:`.codec.Codec`."""
        block_size = block_size or self.default_block_size
        size = self.num_payload_bytes(weights.numel(), block_size, 0)
        payload = torch.empty(size, dtype=torch.uint8, device=weights.device)
        units, scale_codes, codes = _sections(payload, weights.numel(), block_size)
        encode_table = _encode_table(weights.device)
        reader = BlockReader(weights, block_size)
        for part, blocks, scratch, absmax in reader:
            unit, scale_code = _scale_codes(absmax)
            first = part.start // block_size
            first_unit = first // BLOCKS_PER_UNIT
            scale_codes[first : first + absmax.numel()] = scale_code
            units[first_unit : first_unit + unit.numel()] = unit
            torch.mul(blocks, _grid_over(_scales(unit, scale_code)).unsqueeze(1), out=scratch)
            scratch.round_().clamp_(-_GRID, _GRID).add_(_GRID)
            levels = encode_table.index_select(0, scratch.view(-1).to(torch.int32))
            pairs = slice(part.start // 2, num_blocks(part.stop, 2))
            codes[pairs] = _pack(levels)[: pairs.stop - pairs.start]
        return finished(payload, reader)

    def decode(
        self, payload: torch.Tensor, num_weights: int, block_size: int | None, num_nonfinite: int
    ) -> torch.Tensor:
        """See :class:`.codec.Codec`."""
        block_size = block_size or self.default_block_size
        positions, values, rest = split_nonfinite(payload, num_nonfinite)
        units, scale_codes, codes = _sections(rest, num_weights, block_size)
        pair_table = _pair_table(payload.device)
        weights = torch.empty(2 * codes.numel(), dtype=torch.float32, device=payload.device)
        pairs = weights.view(torch.float64)  # two float32 moved as one
        for part in chunks(num_weights, payload.device):
            half = slice(part.start // 2, num_blocks(part.stop, 2))
            torch.index_select(pair_table, 0, codes[half].to(torch.int32), out=pairs[half])
            first, last = part.start // block_size, num_blocks(part.stop, block_size)
            unit = units[first // BLOCKS_PER_UNIT : num_blocks(last, BLOCKS_PER_UNIT)]
            multiply_blocks(weights[part], _scales(unit, scale_codes[first:last]), block_size)
        weights = weights[:num_weights]
        put_nonfinite(weights, positions, values)
        return weights


def _sections(
    payload: torch.Tensor, num_weights: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a payload without non-finite values: units, scale codes, weight codes."""
    num_scales = num_blocks(num_weights, block_size)
    sizes = [4 * num_blocks(num_scales, BLOCKS_PER_UNIT), num_scales, num_blocks(num_weights, 2)]
    units, scale_codes, codes = payload.split(sizes)
    return view_section(units, torch.float32), scale_codes, codes


def _scale_codes(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Units (float32, one for 256 blocks) and codes (uint8) of the absmax of consecutive blocks."""
    missing = -absmax.numel() % BLOCKS_PER_UNIT
    padded = torch.nn.functional.pad(absmax * _HEADROOM, (0, missing)).view(-1, BLOCKS_PER_UNIT)
    unit = (padded.amax(dim=1) * (1.0 / _MAX_CODE**2)).clamp_(min=_MIN_UNIT)
    code = (padded / unit.unsqueeze(1)).sqrt_().round_().clamp_(0, _MAX_CODE)
    return unit, code.view(-1)[: absmax.numel()].to(torch.uint8)


def _scales(units: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Scale of each block, float32; one rounding, so every device agrees."""
    squares = codes.float().square_()
    multiply_blocks(squares, units, BLOCKS_PER_UNIT)
    return squares.clamp_(max=_FLOAT32_MAX)


def _grid_over(scales: torch.Tensor) -> torch.Tensor:
    """_GRID / scale, and 0 where the scale is 0: such a block decodes to zeros whatever its codes."""
    return torch.where(scales > 0, torch.full_like(scales, _GRID) / scales, torch.zeros_like(scales))


def _pack(levels: torch.Tensor) -> torch.Tensor:
    """Two codes (uint8, an even number of them) a byte, the earlier in the low half."""
    words = levels.view(torch.int16)
    return (words | (words >> 4)).to(torch.uint8)


def _encode_table(device: torch.device) -> torch.Tensor:
    """Code of the level nearest to ``i / _GRID - 1`` for i from 0 to 2 * _GRID."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    borders = (levels[:-1] + levels[1:]) / 2
    grid = torch.arange(-_GRID, _GRID + 1, dtype=torch.float64) / _GRID
    return torch.bucketize(grid, borders).to(torch.uint8).to(device)


def _pair_table(device: torch.device) -> torch.Tensor:
    """Both levels of each byte, side by side in one float64's place."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    byte = torch.arange(256)
    pairs = torch.stack([levels[byte & 15], levels[byte >> 4]], dim=1)
    return pairs.view(torch.float64).view(-1).to(device)
