"""One safetensors file: mapped for reading, streamed tensor by tensor for writing."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nvflare_llm_components.checkpoint.errors import CheckpointError

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


def map_tensor_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, mapped from it: a page is read when it is touched.

    The mapping is private: changing a tensor never changes the file.

    Raises:
        CheckpointError: if the file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected a complete safetensors file, found '{error}'. Copy or download the file again."
        ) from error


def write_tensor_file(
    path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> str:
    """Write tensors into a new, synced safetensors file, holding at most one converted tensor at a time.

    Args:
        path: the file; it must not exist.
        tensors: values by name.
        dtype: what floating-point tensors are converted to; None keeps theirs.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        CheckpointError: if a tensor has a dtype that safetensors does not know.
    """
    # Wide dtypes first, so that every tensor is aligned to its own item size.
    names = sorted(tensors, key=lambda name: (-stored_dtype(tensors[name], dtype).itemsize, name))
    digest = hashlib.sha256()
    # Hashing takes as long as writing; both let go of the interpreter, so they run side by side.
    with path.open("xb") as file, ThreadPoolExecutor(1) as pool:
        for block in _blocks(names, tensors, dtype):
            hashed = pool.submit(digest.update, block)
            file.write(block)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def stored_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return a tensor's dtype on disk when `dtype` is asked for: integers and bools keep theirs."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _blocks(
    names: list[str], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> Iterator[bytes | memoryview]:
    yield _header(names, tensors, dtype)
    for name in names:
        value = tensors[name].detach().to(device="cpu", dtype=stored_dtype(tensors[name], dtype)).contiguous()
        yield value.reshape(-1).view(torch.uint8).numpy().data


def _header(names: list[str], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        stored = stored_dtype(tensors[name], dtype)
        if stored not in DTYPE_NAMES:
            raise CheckpointError(f"{name}: expected a dtype that safetensors can hold, found {stored}.")
        end = start + tensors[name].numel() * stored.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[stored],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
