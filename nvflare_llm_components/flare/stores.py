"""Where tensors that arrive in pieces are put together: in memory, or in a file that is mapped."""

import math
import mmap
import tempfile
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

_ALIGNED = 64


class Store(Protocol):
    """Tensors that are put together one after the other."""

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Make room for the next one.

        Raises:
            ValueError: if there is one of this name.
        """

    def write(self, start: int, buffer: bytes | memoryview) -> None:
        """Put bytes of it where they belong: after those that are there."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, once they are whole; no more can be put in."""

    def close(self) -> None:
        """Let go of what was put in."""


class InMemory:
    """A :class:`Store` of tensors that can be let go of one by one."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = np.empty(0, np.uint8)

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """See :class:`Store`."""
        _check_is_new(name, self._tensors)
        self._tensors[name] = torch.empty(tuple(shape), dtype=dtype)
        self._bytes = flat_bytes(self._tensors[name]).numpy()

    def write(self, start: int, buffer: bytes | memoryview) -> None:
        """See :class:`Store`."""
        self._bytes[start : start + len(buffer)] = np.frombuffer(buffer, np.uint8)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See :class:`Store`."""
        return self._tensors

    def close(self) -> None:
        """See :class:`Store`."""
        self._tensors = {}


class OnDisk:
    """A :class:`Store` in one file without a name, gone with the last of its tensors.

    The tensors are private mappings: the system can take their memory back at any time.

    Args:
        folder: where the file takes its space.

    Raises:
        OSError: where the disk is full, at once or when bytes are put in.
    """

    def __init__(self, folder: str) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed when the tensors are mapped)
        self._places: dict[str, tuple[int, torch.dtype, Sequence[int]]] = {}
        self._begin = self._end = 0

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """See :class:`Store`."""
        _check_is_new(name, self._places)
        self._begin = -(-self._end // _ALIGNED) * _ALIGNED
        self._places[name] = self._begin, dtype, shape

    def write(self, start: int, buffer: bytes | memoryview) -> None:
        """See :class:`Store`."""
        self._file.seek(self._begin + start)
        self._file.write(buffer)
        self._end = self._begin + start + len(buffer)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See :class:`Store`."""
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY) if self._end else b""
        self._file.close()
        return {name: _view(mapped, *place) for name, place in self._places.items()}

    def close(self) -> None:
        """See :class:`Store`."""
        self._file.close()


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 of shape (nbytes,), in the same memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _view(buffer: Any, begin: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=begin).view(tuple(shape))


def _check_is_new(name: str, known: dict[str, Any]) -> None:
    if name in known:
        raise ValueError("a tensor should come once")
