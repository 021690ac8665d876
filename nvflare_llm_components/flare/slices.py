"""Tensors in slices: what a transfer takes of memory is a slice, not the largest tensor.

FLARE packs each tensor as a whole, and keeps the packed bytes until all receivers have them. Here a reply
holds views of the tensors' own memory, at most :data:`SLICE_BYTES`, and the receiver writes them where they
belong: into the tensors, or into a file that is mapped. A receiver says with its first request that it knows
slices; to one that does not, and from a sender that does not, tensors travel FLARE's way.

A reply is a list: a header, and one buffer for each slice that the header tells of::

    [b'[{"name": "T0", "dtype": "float32", "shape": [2048, 8192], "start": 0}, ...]', <bytes>, ...]

The slices of a tensor follow each other, and so do the tensors; `start` counts bytes.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nvflare.app_opt.pt import tensor_downloader as downloader
from nvflare.app_opt.pt.tensor_downloader import TensorDownloadable
from nvflare.fuel.f3.streaming.cacheable import ItemConsumer
from nvflare.fuel.f3.streaming.download_service import DownloadService, ProduceRC, download_object
from safetensors.torch import load

from nvflare_llm_components.flare.stores import InMemory, OnDisk, Store, flat_bytes

SLICE_BYTES = 16 * 2**20
"""Above 10 MB FLARE sends a buffer as it is, below it copies it into its message; enough for a long line."""
_MOST_SLICES = 1000  # of a reply
_KNOWN = "slices"
_STATE = "state"  # FLARE's name of what a request continues from
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "complex64"),
    )
}
_MAX_DIMS = 64
_MAX_BYTES = 1 << 42  # of one tensor
_MAX_HEADER = 1 << 20
Cut = tuple[str, slice]


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
        super().__init__({name: _plain(tensor) for name, tensor in tensors.items()}, max_chunk_size)
        self._replies = _replies({name: tensor.nbytes for name, tensor in tensors.items()}, slice_bytes)
        self._is_known = all(_dtype_name(tensor) in _DTYPES for tensor in tensors.values())

    def set_transaction(self, tx_id: str, ref_id: str) -> None:
        """See FLARE's Downloadable. What is packed for one receiver is not kept for others."""
        super().set_transaction(tx_id, ref_id)
        self.num_receivers = 1

    def produce(self, state: Any, requester: str) -> tuple[str, Any, dict[str, Any]]:
        """See FLARE's Downloadable."""
        if not self._is_known or not isinstance(state, dict) or _KNOWN not in state:
            whole: tuple[str, Any, dict[str, Any]] = super().produce(state, requester)
            return whole
        number = state[_KNOWN]
        if not isinstance(number, int) or not 0 <= number <= len(self._replies):
            raise SliceError(f"a request should continue from one of {len(self._replies)} replies")
        if number == len(self._replies):
            return ProduceRC.EOF, None, {}
        tensors = self.base_obj
        if tensors is None:
            raise SliceError("a request came after the tensors were let go of")
        cuts = self._replies[number]
        header = json.dumps([_described(name, tensors[name], part.start) for name, part in cuts]).encode()
        buffers = [flat_bytes(tensors[name])[part].cpu().numpy().data for name, part in cuts]
        return ProduceRC.OK, [header, *buffers], {_KNOWN: number + 1}


class SliceConsumer(ItemConsumer):
    """Puts tensors together from what a sender replies.

    Args:
        store: where.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.result: dict[str, torch.Tensor] | None = None
        self._store = store
        self._is_sliced: bool | None = None
        self._begun: dict[str, Any] = {}

    def consume(self, ref_id: str, state: dict[str, Any], data: Any) -> dict[str, Any]:
        """See FLARE's Consumer.

        Raises:
            ValueError: for slices that are not what is described, not in their order, or among whole tensors.
        """
        if self._is_sliced not in (None, _KNOWN in state):
            raise SliceError("a message should come in slices or in whole tensors, not in both")
        self._is_sliced = _KNOWN in state
        if not self._is_sliced:
            whole: dict[str, Any] = super().consume(ref_id, state, data)
            return whole
        header, *buffers = data if isinstance(data, list) and data else [b""]
        for described, buffer in zip(_checked_header(header, len(buffers)), buffers, strict=True):
            self._put(described, buffer)
        return state

    def consume_items(self, items: list[Any], result: Any) -> None:
        """Put in tensors that FLARE's own sender has packed."""
        for item in items:
            for name, tensor in load(item).items():
                self._store.begin(name, tensor.dtype, tensor.shape)
                self._store.append(flat_bytes(tensor).numpy().data)

    def download_completed(self, ref_id: str) -> None:
        """See FLARE's Consumer.

        Raises:
            ValueError: where a part of a tensor is missing.
        """
        self.result = self._store.tensors()
        super().download_completed(ref_id)

    def download_failed(self, ref_id: str, reason: str) -> None:
        """See FLARE's Consumer; FLARE also calls it, from another thread, to cut a fetch short."""
        super().download_failed(ref_id, reason)
        self._store.close()

    def _put(self, described: dict[str, Any], buffer: Any) -> None:
        """One slice, which begins a tensor or continues it where it stands."""
        if described["name"] != self._begun.get("name"):
            self._store.begin(described["name"], _DTYPES[described["dtype"]], described["shape"])
            self._begun = described
        if described != {**self._begun, "start": self._store.end} or not isinstance(buffer, bytes):
            raise SliceError(f"a slice should continue its tensor at {self._store.end}")
        if not buffer and _size_of(described):
            raise SliceError("a slice should have bytes")
        self._store.append(buffer)


class _DiskConsumer(SliceConsumer):
    """One that FLARE can cut short with all others whose files lie in a folder: its workflow has ended."""

    def __init__(self, folder: str) -> None:
        super().__init__(OnDisk(folder))
        self._folder = Path(folder).resolve()

    def is_under_root(self, root_dir: str) -> bool:
        """See FLARE's DiskTensorConsumer."""
        return self._folder.is_relative_to(Path(root_dir).resolve())


def fetch_tensors(
    cell: Any, folder: str | None = None, *, from_fqcn: str, ref_id: str, **options: Any
) -> tuple[str | None, dict[str, torch.Tensor] | None]:
    """Fetch a message's tensors, in slices where the sender knows them.

    Args:
        cell: of FLARE.
        folder: where they wait in a file; None is memory.
        from_fqcn: FLARE's name of the sender.
        ref_id: of what it has.
        options: those of FLARE's `download_object`.

    Returns:
        Why it failed, or None; and the tensors by FLARE's name for them.
    """
    DownloadService.initialize(cell)
    consumer = SliceConsumer(InMemory()) if folder is None else _DiskConsumer(folder)
    with _can_be_cut_short(consumer):
        try:
            download_object(
                from_fqcn=from_fqcn, ref_id=ref_id, consumer=consumer, cell=_KnowingSlices(cell), **options
            )
        except BaseException as error:
            consumer.download_failed(ref_id, type(error).__name__)
            raise
    return consumer.error, consumer.result


@contextmanager
def _can_be_cut_short(consumer: SliceConsumer) -> Iterator[None]:
    """While it fetches, let FLARE find a consumer that writes to disk."""
    standing, lock = downloader._ACTIVE_DISK_TENSOR_CONSUMERS, downloader._ACTIVE_DISK_TENSOR_CONSUMERS_LOCK
    if isinstance(consumer, _DiskConsumer):
        with lock:
            standing.add(consumer)
    try:
        yield
    finally:
        with lock:
            standing.discard(consumer)


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


def _replies(sizes: Mapping[str, int], slice_bytes: int) -> list[list[Cut]]:
    """The slices of each reply: at most `slice_bytes`, of one large tensor or of several small ones."""
    replies: list[list[Cut]] = []
    room = 0
    for name, size in sizes.items():
        for start in range(0, max(size, 1), slice_bytes):
            part = slice(start, min(start + slice_bytes, size))
            if not replies or part.stop - part.start > room or len(replies[-1]) == _MOST_SLICES:
                replies.append([])
                room = slice_bytes
            replies[-1].append((name, part))
            room -= part.stop - part.start
    return replies


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose bytes are its values, one after the other."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _described(name: str, tensor: torch.Tensor, start: int) -> dict[str, Any]:
    return {"name": name, "dtype": _dtype_name(tensor), "shape": list(tensor.shape), "start": start}


def _size_of(described: Mapping[str, Any]) -> int:
    """Bytes of a tensor."""
    size: int = math.prod(described["shape"]) * _DTYPES[described["dtype"]].itemsize
    return size


def _checked_header(header: Any, num_slices: int) -> list[dict[str, Any]]:
    if not isinstance(header, bytes) or len(header) > _MAX_HEADER:
        raise SliceError("a reply should begin with its header")
    told: list[dict[str, Any]] = json.loads(header)
    is_list = isinstance(told, list) and len(told) == num_slices <= _MOST_SLICES
    if not is_list or not all(map(_is_description, told)):
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
    return _size_of({**told, "shape": [max(size, 1) for size in told["shape"]]}) <= _MAX_BYTES


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0
