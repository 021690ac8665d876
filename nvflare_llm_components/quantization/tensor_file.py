"""A safetensors file written tensor by tensor: a model's worth of state costs one tensor of memory."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open

from nvflare_llm_components.quantization.wire import crc32_of

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_LABEL_WIDTH = 32


class TensorFileWriter:
    """Writes tensors of one dtype; the file appears under its name, complete, on `commit`, or never.

    Args:
        path: where the file will be; its folder is made.
        shapes: shape of each tensor; they must be written in this order.
        dtype: float32 or bfloat16.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._partial = path, path.with_suffix(".partial")
        self._shapes, self._dtype = shapes, dtype
        self._pending = list(shapes)
        self._file = self._partial.open("wb")
        self._file.write(self._header(""))
        self.crc32 = 0

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor."""
        expected = self._pending.pop(0)
        assert (name, tensor.dtype) == (expected, self._dtype), "tensors come in the order of their shapes"
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.crc32 = crc32_of(data, self.crc32)
        self._file.write(data.numpy().data)

    def commit(self, label: str) -> None:
        """Put the file in place, with a label of at most 32 characters."""
        assert not self._pending, f"not written: {self._pending[:3]}"
        self._file.seek(0)
        self._file.write(self._header(label))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._partial.replace(self._path)

    def _header(self, label: str) -> bytes:
        header: dict[str, object] = {"__metadata__": {"label": label.ljust(_LABEL_WIDTH)}}
        start = 0
        for name, shape in self._shapes.items():
            stop = start + torch.Size(shape).numel() * self._dtype.itemsize
            header[name] = {"dtype": _NAMES[self._dtype], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class TensorFile:
    """Reads such a file tensor by tensor, also after a new file has taken its place."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = set(self._file.keys())
        self.label = str((self._file.metadata() or {}).get("label", "")).rstrip()

    @classmethod
    def open_if_there(cls, path: Path) -> "TensorFile | None":
        """The file at `path`, or None where there is none."""
        return cls(path) if path.is_file() else None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of one tensor, or None where there is no such tensor."""
        return tuple(self._file.get_slice(name).get_shape()) if name in self._names else None

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor
