"""Codes of less than a byte with a one-byte scale a block: what ``nf4`` and ``int2`` share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch

from nvflare_llm_components.quantization.blocks import (
    NONFINITE_BYTES,
    finished,
    multiply_blocks,
    num_blocks,
    put_nonfinite,
    read_blocks,
    split_nonfinite,
)
from nvflare_llm_components.quantization.chunks import FlatValues, chunks
from nvflare_llm_components.quantization.codec import Encoded
from nvflare_llm_components.quantization.scales import (
    BLOCKS_PER_UNIT,
    check_scales,
    decode_scales,
    encode_scales,
    num_scale_bytes,
    sections,
)

ToCodes = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class PackedCodec(ABC):
    """A table of levels, several codes a byte.

    Payload: non-finite positions and values, units (float32, one for 256 blocks), scale codes (uint8, one a
    block), codes (the earlier weight in the lower bits of a byte).
    """

    name: str
    bits: int
    default_block_size: int = 64
    is_for_differences: bool = True
    moved_as: ClassVar[torch.dtype]
    """As wide as the float32 weights of one byte of codes: they are moved as one."""

    def num_payload_bytes(self, num_weights: int, block_size: int | None, num_nonfinite: int) -> int:
        """See :class:`.codec.Codec`."""
        scales = num_scale_bytes(num_blocks(num_weights, block_size or self.default_block_size))
        return NONFINITE_BYTES * num_nonfinite + scales + num_blocks(num_weights, self._per_byte)

    def encode(self, weights: torch.Tensor | FlatValues, block_size: int | None) -> Encoded:
        """See :class:`.codec.Codec`."""
        block_size = block_size or self.default_block_size
        size = self.num_payload_bytes(weights.numel(), block_size, 0)
        payload = torch.empty(size, dtype=torch.uint8, device=weights.device)
        units, scale_codes, packed = sections(payload, num_blocks(weights.numel(), block_size))
        to_codes = self.to_codes(weights.device)

        def encode_chunk(
            part: slice, blocks: torch.Tensor, scratch: torch.Tensor, absmax: torch.Tensor
        ) -> None:
            unit, scale_code = encode_scales(self.scales_of(scratch, absmax, part.stop - part.start))
            first = part.start // block_size
            scale_codes[first : first + absmax.numel()] = scale_code
            units[first // BLOCKS_PER_UNIT :][: unit.numel()] = unit
            codes = to_codes(blocks, decode_scales(unit, scale_code), scratch)
            some = slice(part.start // self._per_byte, num_blocks(part.stop, self._per_byte))
            packed[some] = self.pack(codes)[: some.stop - some.start]

        return finished(payload, read_blocks(weights, block_size, encode_chunk))

    def check(
        self, payload: torch.Tensor, num_weights: int, block_size: int | None, num_nonfinite: int
    ) -> None:
        """See :class:`.codec.Codec`."""
        check_scales(payload, num_weights, block_size or self.default_block_size, num_nonfinite)

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
        units, scale_codes, packed = sections(rest, num_blocks(num_weights, block_size))
        for part in chunks(slice(0, out.numel()), payload.device):
            begin, end = start + part.start, start + part.stop
            self._look_up(packed[begin // self._per_byte : num_blocks(end, self._per_byte)], out[part])
            first, last = begin // block_size, num_blocks(end, block_size)
            unit = units[first // BLOCKS_PER_UNIT : num_blocks(last, BLOCKS_PER_UNIT)]
            multiply_blocks(out[part], decode_scales(unit, scale_codes[first:last]), block_size)
        put_nonfinite(out, positions, values, start)

    @abstractmethod
    def levels(self) -> torch.Tensor:
        """Value of each code in parts of a block's scale: float32 of shape (2**bits,)."""

    @abstractmethod
    def scales_of(self, magnitudes: torch.Tensor, absmax: torch.Tensor, num_weights: int) -> torch.Tensor:
        """Scale of each block, float32 of shape (num_blocks,).

        Args:
            magnitudes: of the weights, (num_blocks, block_size), the last one filled up; may be overwritten.
            absmax: largest of each block.
            num_weights: without what fills up the last block.
        """

    @abstractmethod
    def to_codes(self, device: torch.device) -> ToCodes:
        """What makes codes (uint8, flat) of weights in blocks, their scales, and room to work in."""

    @abstractmethod
    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Several codes a byte; their number is a multiple of that."""

    @property
    def _per_byte(self) -> int:
        return 8 // self.bits

    def _look_up(self, packed: torch.Tensor, out: torch.Tensor) -> None:
        """Write the levels of packed codes; the last byte may hold more than there is room for."""
        table, num_whole = _levels_of_bytes(self, packed.device), out.numel() // self._per_byte
        whole, rest = out.split([num_whole * self._per_byte, out.numel() % self._per_byte])
        indices = packed.to(torch.int32)
        torch.index_select(table, 0, indices[:num_whole], out=whole.view(self.moved_as))
        if rest.numel():
            rest.copy_(table[indices[num_whole:]].view(torch.float32)[: rest.numel()])


@cache
def _levels_of_bytes(codec: PackedCodec, device: torch.device) -> torch.Tensor:
    """The levels of each byte's codes, side by side in the place of one element of `moved_as`."""
    byte, mask, levels = torch.arange(256), 2**codec.bits - 1, codec.levels()
    groups = torch.stack([levels[(byte >> shift) & mask] for shift in range(0, 8, codec.bits)], dim=1)
    return groups.view(codec.moved_as).view(-1).to(device)
