"""Where tensors that arrive in pieces are put together: in memory, or in a file that is mapped."""

import mmap
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch

_ALIGNED = 64


class Store(ABC):
    """Tensors that are put together one after the other, each from its first byte to its last."""

    def __init__(self) -> None:
        self._size = self.end = 0

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Make room for the next one.

        Raises:
            ValueError: if the one before it is not whole, or there is one of this name.
        """
        self._check_is_whole()
        self._make_room(name, dtype, torch.Size(shape))
        self._size, self.end = torch.Size(shape).numel() * dtype.itemsize, 0

    def append(self, buffer: bytes | memoryview) -> None:
        """Put in the next bytes of it.

        Raises:
            ValueError: if it would have more than it can have.
        """
        if self.end + len(buffer) > self._size:
            raise ValueError(f"a tensor should have {self._size} bytes, not {self.end + len(buffer)}")
        self._write(self.end, buffer)
        self.end += len(buffer)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them; no more can be put in.

        Raises:
            ValueError: if the last one is not whole.
        """
        self._check_is_whole()
        return self._tensors()

    def _check_is_whole(self) -> None:
        if self.end != self._size:
            raise ValueError(f"a tensor should have {self._size} bytes, not {self.end}")

    @abstractmethod
    def close(self) -> None:
        """Let go of what was put in: nothing more can be, and no tensor comes of it."""

    @abstractmethod
    def _make_room(self, name: str, dtype: torch.dtype, shape: torch.Size) -> None:
        """Of an unused name."""

    @abstractmethod
    def _write(self, start: int, buffer: bytes | memoryview) -> None:
        """Bytes of the tensor that was begun last."""

    @abstractmethod
    def _tensors(self) -> dict[str, torch.Tensor]:
        """All of them, which are whole."""


class InMemory(Store):
    """A :class:`Store` of tensors that can be let go of one by one."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[str, torch.Tensor] = {}
        self._bytes = np.empty(0, np.uint8)

    def close(self) -> None:
        """See :class:`Store`."""
        self._made, self._bytes, self._size = {}, np.empty(0, np.uint8), 0

    def _make_room(self, name: str, dtype: torch.dtype, shape: torch.Size) -> None:
        _check_is_new(name, name in self._made)
        self._made[name] = torch.empty(shape, dtype=dtype)
        self._bytes = flat_bytes(self._made[name]).numpy()

    def _write(self, start: int, buffer: bytes | memoryview) -> None:
        self._bytes[start : start + len(buffer)] = np.frombuffer(buffer, np.uint8)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._made


class OnDisk(Store):
    """A :class:`Store` in one file without a name, gone with the last of its tensors.

    The tensors are its mapping, which nobody shares: the system can take their memory back at any time, also
    of more than it has. May be closed by another thread.

    Args:
        folder: where the file takes its space.

    Raises:
        OSError: where the disk is full, at once or when bytes are put in.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed when it is mapped)
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        self._begin = self._length = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """See :class:`Store`."""
        with self._lock, suppress(OSError):  # of a full disk, which was told when it was written
            self._file.close()

    def _make_room(self, name: str, dtype: torch.dtype, shape: torch.Size) -> None:
        _check_is_new(name, name in self._places)
        self._begin = -(-self._length // _ALIGNED) * _ALIGNED
        self._places[name] = self._begin, dtype, shape

    def _write(self, start: int, buffer: bytes | memoryview) -> None:
        with self._lock:
            self._file.seek(self._begin + start)
            self._file.write(buffer)
        self._length = self._begin + start + len(buffer)

    def _tensors(self) -> dict[str, torch.Tensor]:
        with self._lock, self._file:
            self._file.flush()
            mapped = _mapped(self._file.fileno(), self._length)
        return {name: _view(mapped, *place) for name, place in self._places.items()}


def _mapped(descriptor: int, length: int) -> torch.Tensor:
    """The bytes of a file: shared, so that no memory is promised to them."""
    path = Path(f"/proc/self/fd/{descriptor}")
    if not length:
        return torch.empty(0, dtype=torch.uint8)
    if path.exists():  # keeps no descriptor, of which a process has few
        return torch.from_file(str(path), shared=True, size=length, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(descriptor, length), dtype=torch.uint8)


def _view(mapped: torch.Tensor, begin: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    size = shape.numel() * dtype.itemsize
    return mapped[begin : begin + size].view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 of shape (nbytes,), in the same memory."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # one value alone may have any stride
    return flat.view(torch.uint8)


def _check_is_new(name: str, is_known: bool) -> None:
    if is_known:
        raise ValueError("a tensor should come once")
