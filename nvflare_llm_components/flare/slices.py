"""Tensors in slices: what a transfer takes of memory is a slice, not the largest tensor.

FLARE packs each tensor as a whole, and keeps the packed bytes until all receivers have them. Here a reply
holds views of the tensors' own memory, at most :data:`SLICE_BYTES`, and the receiver writes them where they
belong. A receiver says with its first request that it knows slices; to one that does not, and from a sender
that does not, tensors travel FLARE's way.

A reply is a list: a header, and one buffer for each slice that the header tells of::

    [b'[{"name": "T0", "dtype": "float32", "shape": [2048, 8192], "start": 0}, ...]', <bytes>, ...]

The slices of a tensor follow each other, and so do the tensors; `start` counts bytes.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvflare.app_opt.pt.tensor_downloader import TensorConsumer, TensorDownloadable
from nvflare.fuel.f3.streaming.download_service import ProduceRC, download_object

SLICE_BYTES = 16 * 2**20
"""Above 10 MB FLARE sends a buffer as it is, below it copies it into its message; enough for a long line."""
_KNOWN = "slices"
_STATE = "state"  # FLARE's name of what a request continues from
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "complex64"),
    )
}
_MAX_DIMS = 64
_MAX_BYTES = 1 << 42  # of one tensor
_MAX_HEADER = 1 << 20


class SliceError(ValueError):
    """What arrived are no slices that could have been sent."""


class SlicedTensors(TensorDownloadable):
    """Tensors that wait to be fetched, by any number of receivers; nothing is copied, nothing kept.

    Args:
        tensors: by FLARE's name for them in one message.
        max_chunk_size: bytes of a reply to receivers that do not know slices.
        slice_bytes: bytes of a reply to those that do.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], max_chunk_size: int, slice_bytes: int = SLICE_BYTES
    ) -> None:
        super().__init__({name: tensor.contiguous() for name, tensor in tensors.items()}, max_chunk_size)
        self._replies = _replies({name: tensor.nbytes for name, tensor in tensors.items()}, slice_bytes)

    def produce(self, state: Any, requester: str) -> tuple[str, Any, dict[str, Any]]:
        """See FLARE's Downloadable."""
        if not isinstance(state, dict) or _KNOWN not in state:
            whole: tuple[str, Any, dict[str, Any]] = super().produce(state, requester)
            return whole
        number = state[_KNOWN]
        if not isinstance(number, int) or not 0 <= number <= len(self._replies):
            raise SliceError(f"a request should continue from a reply of {len(self._replies)}")
        if number == len(self._replies):
            return ProduceRC.EOF, None, {}
        tensors = self.base_obj
        if tensors is None:
            raise SliceError("a request came after the tensors were let go of")
        cuts = self._replies[number]
        header = json.dumps([_described(name, tensors[name], part.start) for name, part in cuts]).encode()
        buffers = [_bytes_of(tensors[name], part) for name, part in cuts]
        return ProduceRC.OK, [header, *buffers], {_KNOWN: number + 1}


class SliceConsumer(TensorConsumer):
    """Puts tensors together from what a sender replies."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.result: dict[str, torch.Tensor] | None = None
        self._arriving = _Arriving("", torch.empty(0))

    def consume(self, ref_id: str, state: dict[str, Any], data: Any) -> dict[str, Any]:
        """See FLARE's Consumer.

        Raises:
            SliceError: for slices that are not what is described, or not in their order.
        """
        if _KNOWN not in state:
            whole: dict[str, Any] = super().consume(ref_id, state, data)
            return whole
        header, *buffers = data if isinstance(data, list) and data else [b""]
        for described, buffer in zip(_checked_header(header, len(buffers)), buffers, strict=True):
            if described["name"] != self._arriving.name or self.result is None:
                self._begin(described)
            self._arriving.put(described, buffer)
        return state

    def download_completed(self, ref_id: str) -> None:
        """See FLARE's Consumer.

        Raises:
            SliceError: where a part of a tensor is missing.
        """
        self._arriving.check_is_whole()
        super().download_completed(ref_id)

    def _begin(self, described: Mapping[str, Any]) -> None:
        self._arriving.check_is_whole()
        name, tensors = described["name"], self.result or {}
        if name in tensors:
            raise SliceError("a tensor should come once")
        tensors[name] = torch.empty(described["shape"], dtype=_DTYPES[described["dtype"]])
        self.result, self._arriving = tensors, _Arriving(name, tensors[name])


@dataclass
class _Arriving:
    """A tensor of which slices have come up to `end`, in bytes."""

    name: str
    tensor: torch.Tensor
    end: int = 0

    def put(self, described: Mapping[str, Any], buffer: Any) -> None:
        if described != _described(self.name, self.tensor, self.end) or not isinstance(buffer, bytes):
            raise SliceError(f"a slice should continue its tensor at {self.end}")
        start, self.end = self.end, self.end + len(buffer)
        if self.end > self.tensor.nbytes or (not buffer and self.tensor.nbytes):
            raise SliceError(
                f"a slice should have 1 to {self.tensor.nbytes - start} bytes, not {len(buffer)}"
            )
        if buffer:
            _flat(self.tensor).numpy()[start : self.end] = np.frombuffer(buffer, np.uint8)

    def check_is_whole(self) -> None:
        if self.end != self.tensor.nbytes:
            raise SliceError(f"a tensor should have {self.tensor.nbytes} bytes, not {self.end}")


def fetch_tensors(
    cell: Any, *, from_fqcn: str, ref_id: str, **options: Any
) -> tuple[str | None, dict[str, torch.Tensor] | None]:
    """Fetch a message's tensors, in slices where the sender knows them.

    Args:
        cell: of FLARE.
        from_fqcn: FLARE's name of the sender.
        ref_id: of what it has.
        options: those of FLARE's `download_object`.

    Returns:
        Why it failed, or None; and the tensors by FLARE's name for them.
    """
    consumer = SliceConsumer()
    download_object(
        from_fqcn=from_fqcn, ref_id=ref_id, consumer=consumer, cell=_KnowingSlices(cell), **options
    )
    return consumer.error, consumer.result


class _KnowingSlices:
    """A cell of FLARE whose requests say that slices are known; FLARE takes it for the cell itself."""

    def __init__(self, cell: Any) -> None:
        self._cell = cell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cell, name)

    def __eq__(self, other: object) -> bool:
        return bool(self._cell == other)

    def __hash__(self) -> int:
        return hash(self._cell)

    def send_request(self, *, request: Any, **options: Any) -> Any:
        """See FLARE's Cell."""
        request.payload.setdefault(_STATE, {_KNOWN: 0})
        return self._cell.send_request(request=request, **options)


def _replies(sizes: Mapping[str, int], slice_bytes: int) -> list[list[tuple[str, slice]]]:
    """The slices of each reply: at most `slice_bytes`, of one large tensor or of several small ones."""
    replies: list[list[tuple[str, slice]]] = []
    room = 0
    for name, size in sizes.items():
        for start in range(0, max(size, 1), slice_bytes):
            part = slice(start, min(start + slice_bytes, size))
            if not replies or part.stop - part.start > room:
                replies.append([])
                room = slice_bytes
            replies[-1].append((name, part))
            room -= part.stop - part.start
    return replies


def _described(name: str, tensor: torch.Tensor, start: int) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "shape": list(tensor.shape), "start": start}


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _bytes_of(tensor: torch.Tensor, part: slice) -> memoryview:
    data: memoryview = _flat(tensor)[part].cpu().numpy().data
    return data


def _checked_header(header: Any, num_slices: int) -> list[dict[str, Any]]:
    if not isinstance(header, bytes) or len(header) > _MAX_HEADER:
        raise SliceError("a reply should begin with its header")
    told = json.loads(header)
    if not isinstance(told, list) or len(told) != num_slices or not all(map(_is_description, told)):
        raise SliceError("a header should describe each slice by its name, dtype, shape and start")
    return told


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "dtype": lambda value: isinstance(value, str) and value in _DTYPES,
    "shape": lambda value: isinstance(value, list) and len(value) <= _MAX_DIMS and all(map(_is_size, value)),
    "start": lambda value: _is_size(value),
}


def _is_description(told: Any) -> bool:
    if not isinstance(told, dict) or told.keys() != _FIELDS.keys():
        return False
    if not all(is_right(told[field]) for field, is_right in _FIELDS.items()):
        return False
    num_weights: int = math.prod(max(size, 1) for size in told["shape"])
    size_bytes: int = num_weights * _DTYPES[told["dtype"]].itemsize
    return size_bytes <= _MAX_BYTES


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0
