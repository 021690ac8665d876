"""``int8``: blockwise absmax, one signed byte a weight and a bfloat16 scale a block.

Error of a weight: at most half its block's scale, where scale is absmax / 127 rounded up to bfloat16, and
2**-126 at least. (Within 2**120 of float32's largest value the scale is capped, and the bound is one scale.)
A relative error of 0.0060 on Gaussian weights at the default block of 128, at 8.125 bits a weight.
"""

from dataclasses import dataclass

import torch

from nvflare_llm_components.quantization.blocks import (
    NONFINITE_BYTES,
    check_nonfinite,
    check_range,
    finished,
    multiply_blocks,
    num_blocks,
    put_nonfinite,
    read_blocks,
    split_nonfinite,
    view_section,
)
from nvflare_llm_components.quantization.chunks import FlatValues, chunks
from nvflare_llm_components.quantization.codec import Encoded

_MAX_CODE = 127
_MIN_SCALE = 2.0**-126  # the smallest normal float32: its reciprocal is finite
_MAX_SCALE = 2.0**121 * (1 + 1 / 128)  # the largest bfloat16 whose 127-fold is finite in float32


@dataclass(frozen=True)
class Int8Codec:
    """Blockwise absmax. Payload: non-finite positions and values, scales (bfloat16), codes (int8)."""

    name: str = "int8"
    bits: int = 8
    default_block_size: int = 128
    is_for_differences: bool = False

    def num_payload_bytes(self, num_weights: int, block_size: int | None, num_nonfinite: int) -> int:
        """See :class:`.codec.Codec`."""
        scales = 2 * num_blocks(num_weights, block_size or self.default_block_size)
        return NONFINITE_BYTES * num_nonfinite + scales + num_weights

    def encode(self, weights: torch.Tensor | FlatValues, block_size: int | None) -> Encoded:
        """See :class:`.codec.Codec`."""
        block_size = block_size or self.default_block_size
        size = self.num_payload_bytes(weights.numel(), block_size, 0)
        payload = torch.empty(size, dtype=torch.uint8, device=weights.device)
        num_scales = num_blocks(weights.numel(), block_size)
        scales = payload[: 2 * num_scales].view(torch.bfloat16)
        codes = payload[2 * num_scales :].view(torch.int8)

        def encode_chunk(
            part: slice, blocks: torch.Tensor, scratch: torch.Tensor, absmax: torch.Tensor
        ) -> None:
            scale = _scale_of(absmax)
            first = part.start // block_size
            scales[first : first + scale.numel()] = scale
            torch.mul(blocks, torch.ones_like(scale).div_(scale).unsqueeze(1), out=scratch)
            scratch.round_()  # 127 at most: float32's largest value is 127.01 of the largest scale
            codes[part] = scratch.view(-1)[: part.stop - part.start]

        return finished(payload, read_blocks(weights, block_size, encode_chunk))

    def check(
        self, payload: torch.Tensor, num_weights: int, block_size: int | None, num_nonfinite: int
    ) -> None:
        """See :class:`.codec.Codec`."""
        rest = check_nonfinite(payload, num_weights, num_nonfinite)
        num_scales = num_blocks(num_weights, block_size or self.default_block_size)
        check_range("scales", view_section(rest[: 2 * num_scales], torch.bfloat16), _MIN_SCALE, _MAX_SCALE)
        check_range("codes", rest[2 * num_scales :].view(torch.int8), -_MAX_CODE, _MAX_CODE)

    def decode_into(
        self,
        out: torch.Tensor,
        payload: torch.Tensor,
        num_weights: int,
        block_size: int | None,
        num_nonfinite: int,
        start: int = 0,
    ) -> None:
        """See :class:`.codec.Codec`."""
        block_size = block_size or self.default_block_size
        positions, values, rest = split_nonfinite(payload, num_nonfinite)
        num_scales = num_blocks(num_weights, block_size)
        scale_bytes, codes = rest.split([2 * num_scales, num_weights])
        for part in chunks(slice(0, out.numel()), payload.device):
            target = out[part].copy_(codes[start + part.start : start + part.stop].view(torch.int8))
            first = (start + part.start) // block_size
            some = slice(2 * first, 2 * (first + num_blocks(target.numel(), block_size)))
            multiply_blocks(target, view_section(scale_bytes[some], torch.bfloat16).float(), block_size)
        put_nonfinite(out, positions, values, start)


def _scale_of(absmax: torch.Tensor) -> torch.Tensor:
    """Absmax / 127 rounded up to bfloat16, as float32: integer arithmetic, so every device agrees."""
    bits = (absmax * (1.0 / _MAX_CODE)).view(torch.int32)
    rounded = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return rounded.clamp_(_MIN_SCALE, _MAX_SCALE)
