"""What the blockwise codecs share: padding, and non-finite values."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from nvflare_llm_components.quantization.chunks import (
    FlatValues,
    chunk_size,
    chunks,
    each_share,
    flat_values,
)
from nvflare_llm_components.quantization.codec import Encoded

MIN_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 1024
NONFINITE_BYTES = 12  # int64 position and float32 value
_FLOAT32_MAX = torch.finfo(torch.float32).max
_QUIET_NAN_BITS = 0x7FC00000


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is a power of two within the supported range."""
    legal = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not legal or block_size & (block_size - 1) or not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(
            f"block_size should be a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}. "
            f"Found {block_size!r}."
        )


def num_blocks(num_weights: int, block_size: int) -> int:
    """Blocks that hold `num_weights` weights; the last may be partial."""
    return -(-num_weights // block_size)


EncodeChunk = Callable[[slice, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with what :class:`BlockReader` yields; chunks come at once, in threads."""


def read_blocks(
    weights: torch.Tensor | FlatValues, block_size: int, encode_chunk: EncodeChunk
) -> "list[BlockReader]":
    """Let all weights be encoded; returns what read them, in their order."""
    flat = flat_values(weights)

    def read(share: slice) -> BlockReader:
        reader = BlockReader(flat, block_size, share)
        for chunk in reader:
            encode_chunk(*chunk)
        return reader

    return each_share(read, flat.numel(), flat.device)


class BlockReader:
    """Reads weights chunk by chunk as float32 blocks, non-finite weights taken out and remembered.

    Args:
        flat: all weights.
        block_size: weights in a block.
        share: those of them that are read.
    """

    def __init__(self, flat: FlatValues, block_size: int, share: slice) -> None:
        self._flat, self._share = flat, share
        self._block_size = block_size
        count = share.stop - share.start
        size = min(chunk_size(flat.device), num_blocks(count, block_size) * block_size)
        self._scratch = torch.empty(size, dtype=torch.float32, device=flat.device)
        self._blocks: torch.Tensor | None = None
        self.positions: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.num_saturated = 0

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (weights covered, blocks, scratch of the same shape, absmax of each block).

        Blocks are float32 of shape (blocks, block_size), zero beyond the end, and valid until the next step.
        They are not to be changed: they may be the weights themselves.
        """
        for part in chunks(self._share, self._flat.device):
            count = part.stop - part.start
            source = self._flat[part]
            padded = num_blocks(count, self._block_size) * self._block_size
            is_ready = source.dtype == torch.float32 and count == padded and source.is_contiguous()
            blocks = source.view(-1, self._block_size) if is_ready else self._copied(source, padded)
            scratch = self._scratch[:padded].view_as(blocks)
            absmax = torch.abs(blocks, out=scratch).amax(dim=1)
            if not math.isfinite(float(absmax.max())):
                blocks = self._copied(source, padded)
                self._take_out(part, source, blocks.view(-1)[:count])
                absmax = torch.abs(blocks, out=scratch).amax(dim=1)
            yield part, blocks, scratch, absmax

    def _copied(self, source: torch.Tensor, padded: int) -> torch.Tensor:
        if self._blocks is None:
            self._blocks = torch.empty_like(self._scratch)
        self._blocks[: source.numel()].copy_(source)
        self._blocks[source.numel() : padded].zero_()
        return self._blocks[:padded].view(-1, self._block_size)

    def _take_out(self, part: slice, source: torch.Tensor, chunk: torch.Tensor) -> None:
        saturated = chunk.isinf() & source.isfinite()  # a float64 beyond float32
        chunk.copy_(torch.where(saturated, chunk.sign() * _FLOAT32_MAX, chunk))
        self.num_saturated += int(saturated.sum())
        (positions,) = torch.nonzero(~chunk.isfinite(), as_tuple=True)
        if positions.numel():
            values = chunk[positions]
            values.view(torch.int32).masked_fill_(values.isnan(), _QUIET_NAN_BITS)
            self.positions.append(positions + part.start)
            self.values.append(values)
            chunk[positions] = 0.0


def finished(payload: torch.Tensor, readers: Sequence[BlockReader]) -> Encoded:
    """A payload with the non-finite weights that its readers met put in front."""
    positions = [part for reader in readers for part in reader.positions]
    values = [part for reader in readers for part in reader.values]
    if positions:
        front = torch.cat(positions).view(torch.uint8), torch.cat(values).view(torch.uint8)
        payload = torch.cat([*front, payload])
    num_nonfinite = sum(part.numel() for part in positions)
    return Encoded(payload, num_nonfinite, sum(reader.num_saturated for reader in readers))


def split_nonfinite(
    payload: torch.Tensor, num_nonfinite: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split a payload into positions (int64), values (float32) and the rest (uint8)."""
    positions, values, rest = payload.split(
        [8 * num_nonfinite, 4 * num_nonfinite, payload.numel() - NONFINITE_BYTES * num_nonfinite]
    )
    return view_section(positions, torch.int64), view_section(values, torch.float32), rest


def check_nonfinite(payload: torch.Tensor, num_weights: int, num_nonfinite: int) -> torch.Tensor:
    """The rest of a payload whose front holds non-finite weights in the order of their positions.

    Raises:
        ValueError: if a position is outside of the tensor or comes twice, or a value is finite.
    """
    positions, values, rest = split_nonfinite(payload, num_nonfinite)
    if num_nonfinite:
        if int(positions[0]) < 0 or int(positions[-1]) >= num_weights or not _is_ascending(positions):
            raise ValueError(f"positions of non-finite weights should ascend below {num_weights}.")
        if bool(values.isfinite().any()):
            raise ValueError("values of non-finite weights should be NaN or infinite. Found a finite one.")
    return rest


def check_range(what: str, values: torch.Tensor, least: float, most: float) -> None:
    """Raise ValueError unless all `values` are numbers from `least` to `most`."""
    if values.numel():
        low, high = (float(value) for value in torch.aminmax(values))
        if not least <= low <= high <= most:  # NaN is neither
            raise ValueError(
                f"{what} should be from {least:.6g} to {most:.6g}. Found {low:.6g} to {high:.6g}."
            )


def put_nonfinite(
    weights: torch.Tensor, positions: torch.Tensor, values: torch.Tensor, start: int = 0
) -> None:
    """Write the non-finite values back to their positions, checked, in place.

    Args:
        weights: the flat weights from `start` on.
        positions: of all weights, ascending.
        values: of all weights.
        start: position of the first of `weights`.
    """
    if positions.numel():
        ends = torch.tensor([start, start + weights.numel()], device=positions.device)
        first, last = torch.searchsorted(positions, ends).tolist()
        weights[positions[first:last] - start] = values[first:last]


def _is_ascending(positions: torch.Tensor) -> bool:
    return bool((positions[1:] > positions[:-1]).all())


def multiply_blocks(weights: torch.Tensor, scales: torch.Tensor, block_size: int) -> None:
    """Multiply each block of the flat `weights` by its scale, in place; the last block may be partial."""
    whole = weights.numel() // block_size
    weights[: whole * block_size].view(whole, block_size).mul_(scales[:whole].unsqueeze(1))
    if whole < scales.numel():
        weights[whole * block_size :].mul_(scales[whole])


def view_section(section: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View a uint8 section of a payload as `dtype`; copies where it is not aligned."""
    if section.storage_offset() % dtype.itemsize:
        section = section.clone()
    return section.view(dtype)
