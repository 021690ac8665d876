"""One safetensors file: mapped for reading, streamed tensor by tensor for writing."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nvflare_llm_components.tensors.blocks import blocks_of
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.lazy import LazyValue
from nvflare_llm_components.tensors.threads import undivided

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
METADATA = "__metadata__"
"""The key of a file's header that is no tensor's name."""

_LABEL_WIDTH = 32

See = Callable[[str, int, torch.Tensor], object]
"""Called with a tensor's name, and one of its flat blocks and where that starts."""

Layout = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""Shape and dtype by name, in the order of the file."""


def map_tensor_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, mapped from it: a page is read when it is touched.

    The mapping is private: changing a tensor never changes the file.

    Raises:
        CheckpointError: if the file is missing, truncated or no safetensors file.
    """
    try:
        file = TensorFile(path)
        return {name: file.read(name) for name in file}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected a complete safetensors file, found '{error}'. Copy or download the file again."
        ) from error


def write_tensor_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor | LazyValue],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    see: See = lambda name, start, block: None,
) -> str:
    """Write tensors into a synced safetensors file, a block on its way to the disk while the next is made.

    Args:
        path: the file; it appears, or is replaced, in one step.
        tensors: values by name; a lazy one is made block by block when it is written.
        dtype: what floating-point tensors are converted to; None keeps theirs.
        metadata: text by name, for the file's header.
        see: called with each block before it is converted.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        CheckpointError: if a tensor has a dtype that safetensors does not know.
    """
    return undivided(lambda: _write_tensor_file(path, tensors, dtype, metadata or {}, see))


def _write_tensor_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor | LazyValue],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    see: See,
) -> str:
    stored = {name: stored_dtype(value, dtype) for name, value in tensors.items()}
    # Wide dtypes first, so that every tensor is aligned to its own item size.
    names = sorted(tensors, key=lambda name: (-stored[name].itemsize, name))
    layout = {name: (tensors[name].shape, stored[name]) for name in names}
    digest = hashlib.sha256()
    with TensorFileWriter(path, layout, {"format": "pt", **metadata}, digest.update) as writer:
        for name in names:
            writer.write_blocks(name, _stored(name, tensors[name], stored[name], see))
        writer.commit()
    return digest.hexdigest()


def _stored(
    name: str, value: torch.Tensor | LazyValue, dtype: torch.dtype, see: See
) -> Iterator[torch.Tensor]:
    """Blocks as they are written; those of a lazy value as copies, since it makes the next in their place."""
    start = 0
    for block in blocks_of(value):
        see(name, start, block)
        start += block.numel()
        yield block.to(dtype, copy=isinstance(value, LazyValue))


def stored_dtype(tensor: torch.Tensor | LazyValue, dtype: torch.dtype | None) -> torch.dtype:
    """Return a tensor's dtype on disk when `dtype` is asked for: integers and bools keep theirs."""
    return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype


class TensorFileWriter:
    """Writes tensors one by one; the file appears under its name, complete, on `commit`, or never.

    Args:
        path: where the file will be; its folder is made.
        layout: the tensors, in the order in which they will be written.
        metadata: text by name, for the header.
        observe: called with each block of the file, in order, beside its writing.

    Raises:
        CheckpointError: if a tensor has a dtype that safetensors does not know.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        metadata: Mapping[str, str] | None = None,
        observe: Callable[[bytes | memoryview], object] = lambda block: None,
    ) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._layout, self._metadata, self._observe = layout, dict(metadata or {}), observe
        self._pending = list(layout)
        header = self._header(self._metadata if metadata else {"label": " " * _LABEL_WIDTH})
        path.parent.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(2)
        self._standing: list[Future[Any]] = []
        self._file = self._partial.open("wb")
        self._put(header)

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def write_blocks(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Append the next tensor by its flat consecutive blocks.

        Each is on its way while the next is made: it must not be changed before the one after it is there.
        """
        expected = self._pending.pop(0)
        shape, dtype = self._layout[expected]
        assert name == expected, "tensors come in the layout's order"
        missing = torch.Size(shape).numel()
        for block in blocks:
            assert block.dtype == dtype, f"{name}: of the layout's dtype"
            missing -= block.numel()
            self._put(block.cpu().contiguous().view(torch.uint8).numpy().data)
        assert missing == 0, f"{name}: blocks cover the tensor"

    def commit(self, label: str | None = None, sync: bool = True) -> None:
        """Put the file in place.

        Args:
            label: of at most 32 characters, where no metadata was given.
            sync: whether to wait until it is on the disk: not where what is read is held against a checksum.
        """
        assert not self._pending, f"not written: {self._pending[:3]}"
        self._settle()
        if label is not None:
            self._file.seek(0)
            self._file.write(self._header({"label": label.ljust(_LABEL_WIDTH)}))
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())
        self._partial.replace(self._path)

    def _put(self, block: bytes | memoryview) -> None:
        self._settle()  # hashing and writing let go of the interpreter: the caller makes the next block
        self._standing = [self._pool.submit(call, block) for call in (self._observe, self._file.write)]

    def _settle(self) -> None:
        standing, self._standing = self._standing, []
        for future in standing:
            future.result()

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        return tensor_file_header(self._layout, metadata)


def tensor_file_header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    """What stands before the values: they follow in the order of `layout`, without gaps.

    Raises:
        CheckpointError: if a tensor has a dtype that safetensors does not know, or the name of the metadata.
    """
    entries: dict[str, object] = {METADATA: metadata}
    start = 0
    for name, (shape, dtype) in layout.items():
        if name == METADATA:
            raise CheckpointError(f"{name}: expected a tensor's name, found that of the header's metadata.")
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{name}: expected a dtype that safetensors can hold, found {dtype}.")
        end = start + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """Reads such a file tensor by tensor, also after a new file has taken its place."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = sorted(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    @classmethod
    def open_if_there(cls, path: Path) -> "TensorFile | None":
        """The file at `path`, or None where there is none."""
        return cls(path) if path.is_file() else None

    @property
    def label(self) -> str:
        """What `TensorFileWriter.commit` was given; empty for none."""
        return self.metadata.get("label", "").rstrip()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of one tensor, or None where there is no such tensor."""
        return tuple(self._file.get_slice(name).get_shape()) if name in self._names else None

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped: a page is read when it is touched, and changing it never changes the file."""
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor
