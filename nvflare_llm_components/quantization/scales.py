"""One byte for the scale of a block, and one float32 unit for 256 of them.

A scale is ``code * code * unit``: the square gives a block a hundred times smaller than the largest its
scale to 4 %, where a linear code would lose it. Error of a scale: at most a step of the root,
``sqrt(scale * unit)``, and a quarter of a unit.
"""

import torch

from nvflare_llm_components.quantization.blocks import (
    check_nonfinite,
    check_range,
    multiply_blocks,
    num_blocks,
    view_section,
)

BLOCKS_PER_UNIT = 256  # a chunk holds whole units of every block size, so chunking never changes a byte
_MAX_CODE = 255
_FLOAT32_MAX = torch.finfo(torch.float32).max
_MIN_UNIT = 2.0**-116  # so that the quotient of a small number and a scale is finite
_MAX_UNIT = _FLOAT32_MAX / _MAX_CODE**2


def num_scale_bytes(num_scales: int) -> int:
    """Bytes of the scales of `num_scales` blocks, units included."""
    return 4 * num_blocks(num_scales, BLOCKS_PER_UNIT) + num_scales


def encode_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Units (float32, one for 256 blocks) and codes (uint8) of the scales of consecutive blocks."""
    missing = -scales.numel() % BLOCKS_PER_UNIT
    padded = torch.nn.functional.pad(scales, (0, missing)).view(-1, BLOCKS_PER_UNIT)
    unit = (padded.amax(dim=1) * (1.0 / _MAX_CODE**2)).clamp_(min=_MIN_UNIT)
    code = (padded / unit.unsqueeze(1)).sqrt_().round_().clamp_(0, _MAX_CODE)
    return unit, code.view(-1)[: scales.numel()].to(torch.uint8)


def decode_scales(units: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Scale of each block, float32; one rounding, so every device agrees."""
    squares = codes.float().square_()
    multiply_blocks(squares, units, BLOCKS_PER_UNIT)
    return squares.clamp_(max=_FLOAT32_MAX)


def over(number: float, scales: torch.Tensor) -> torch.Tensor:
    """`number` / scale, and 0 where the scale is less than any unit: such a block decodes to zeros."""
    quotients = torch.full_like(scales, number) / scales
    return torch.where(scales >= _MIN_UNIT, quotients, torch.zeros_like(scales))


def sections(payload: torch.Tensor, num_scales: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a payload without non-finite values: units, scale codes, and the rest."""
    units = 4 * num_blocks(num_scales, BLOCKS_PER_UNIT)
    parts = payload.split([units, num_scales, payload.numel() - units - num_scales])
    return view_section(parts[0], torch.float32), parts[1], parts[2]


def check_scales(payload: torch.Tensor, num_weights: int, block_size: int, num_nonfinite: int) -> None:
    """Raise ValueError unless the scales and the non-finite weights of a payload are what they may be."""
    rest = check_nonfinite(payload, num_weights, num_nonfinite)
    check_range("units", sections(rest, num_blocks(num_weights, block_size))[0], _MIN_UNIT, _MAX_UNIT)
