"""``fp16`` and ``bf16``: casts that saturate instead of overflowing.

Error of a weight: at most half a unit in the last place of the format (2**-11 relative for fp16 above 2**-14,
2**-25 absolute below; 2**-8 relative for bf16). NaN and infinities keep their place and sign.
"""

from dataclasses import dataclass

import torch

from nvflare_llm_components.quantization.blocks import view_section
from nvflare_llm_components.quantization.chunks import FlatValues, chunks, each_share, flat_values
from nvflare_llm_components.quantization.codec import Encoded

_NONFINITE_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
_QUIET_NAN_BITS = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}


@dataclass(frozen=True)
class CastCodec:
    """A cast to a 16-bit float. Payload: the cast values, little-endian."""

    name: str
    dtype: torch.dtype
    bits: int = 16
    default_block_size: None = None
    is_for_differences: bool = False

    def num_payload_bytes(self, num_weights: int, block_size: int | None, num_nonfinite: int) -> int:
        """See :class:`.codec.Codec`."""
        return 2 * num_weights

    def encode(self, weights: torch.Tensor | FlatValues, block_size: int | None) -> Encoded:
        """See :class:`.codec.Codec`."""
        flat = flat_values(weights)
        payload = torch.empty(2 * flat.numel(), dtype=torch.uint8, device=flat.device)
        values = payload.view(self.dtype)

        def encode_share(share: slice) -> int:
            parts = chunks(share, flat.device)
            return sum(self._encode_chunk(flat[part], values[part]) for part in parts)

        return Encoded(payload, num_saturated=sum(each_share(encode_share, flat.numel(), flat.device)))

    def check(
        self, payload: torch.Tensor, num_weights: int, block_size: int | None, num_nonfinite: int
    ) -> None:
        """See :class:`.codec.Codec`: any bits are a 16-bit float."""

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
        out.copy_(view_section(payload[2 * start :][: 2 * out.numel()], self.dtype))

    def _encode_chunk(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """Cast `source` into `target`; returns how many weights saturated."""
        target.copy_(source if source.dtype != torch.float64 else source.float())
        largest = int((target.view(torch.int16) & 0x7FFF).max())
        return self._repair(source, target) if largest >= _NONFINITE_BITS[self.dtype] else 0

    def _repair(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """Saturate what overflowed in `target`, in place, and give every NaN the same bits."""
        overflowed = target.isinf() & source.isfinite()
        limit = torch.finfo(self.dtype).max
        target.copy_(torch.where(overflowed, target.sign() * limit, target))
        target.view(torch.int16).masked_fill_(source.isnan(), _QUIET_NAN_BITS[self.dtype])
        return int(overflowed.sum())


FP16 = CastCodec("fp16", torch.float16)
BF16 = CastCodec("bf16", torch.bfloat16)


def bfloat16_of(weights: torch.Tensor) -> torch.Tensor:
    """Flat weights in bfloat16, by a cast that saturates."""
    return BF16.encode(weights, None).payload.view(torch.bfloat16)
