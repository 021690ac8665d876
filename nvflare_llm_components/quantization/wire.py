"""One tensor on the wire: its payload and its entry in the meta; :mod:`.checks` says what both must keep to.

An entry is a dict of builtins. For an encoded tensor::

    {"codec": "int8", "dtype": "float32", "shape": [2048, 8192], "block_size": 128, "num_nonfinite": 0,
     "crc32": 305419896}

and its payload is a contiguous 1-D uint8 tensor. For a tensor sent as it is, ``codec`` is ``raw``, the
payload is the tensor itself, and ``block_size`` and ``num_nonfinite`` are absent.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from nvflare_llm_components.quantization.blocks import view_section
from nvflare_llm_components.quantization.cast import CastCodec
from nvflare_llm_components.quantization.chunks import MadeValues, chunks
from nvflare_llm_components.quantization.codec import Codec, Encoded, decode
from nvflare_llm_components.quantization.precision import CODECS
from nvflare_llm_components.tensors.finite import ends_of
from nvflare_llm_components.tensors.lazy import BLOCK_LENGTH

RAW = "raw"
Entry = dict[str, Any]


class WireFormatError(ValueError):
    """A message that does not keep to the wire format."""


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype on the wire, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def crc32_of(tensor: torch.Tensor, start: int = 0) -> int:
    """CRC-32 of the bytes of a CPU tensor in row-major order, continued from `start`."""
    flat = tensor.detach().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, start)


def pack(
    name: str,
    weights: torch.Tensor | MadeValues,
    codec: Codec,
    block_size: int | None,
    marks: Mapping[str, bool] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, Entry, Encoded]:
    """Encode a tensor.

    Args:
        name: parameter name, which the checksum covers.
        weights: floating-point tensor of any shape and device, or what is made as it is read.
        codec: what encodes it.
        block_size: weights that share a scale; None is the codec's default.
        marks: further flags of the entry.
        dtype: what the sender had, where `weights` are made of it; None is theirs.

    Returns:
        Its payload on the CPU, its entry, and what the codec reported.
    """
    size = None if codec.default_block_size is None else block_size or codec.default_block_size
    encoded = codec.encode(weights, size)
    payload = encoded.payload.cpu()
    entry = _described(codec.name, weights, marks, dtype)
    entry |= {"block_size": size, "num_nonfinite": encoded.num_nonfinite}
    return payload, sealed(name, entry, payload), encoded


def pack_raw(
    name: str, weights: torch.Tensor, marks: Mapping[str, bool] | None = None
) -> tuple[torch.Tensor, Entry]:
    """A tensor as it is: contiguous and on the CPU, with its entry."""
    payload = weights.cpu().contiguous()
    return payload, sealed(name, _described(RAW, weights, marks), payload)


def sealed(name: str, entry: Entry, payload: torch.Tensor) -> Entry:
    """The entry with its checksum: CRC-32 of name and fields, continued over the payload."""
    return {**entry, "crc32": crc32_of_entry(name, entry, payload)}


def unpack(payload: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Decode a checked payload: float32 in its shape; a raw tensor comes as it is."""
    if entry["codec"] == RAW:
        return payload
    shape = tuple(entry["shape"])
    codec = CODECS[entry["codec"]]
    return decode(codec, payload, math.prod(shape), entry["block_size"], entry["num_nonfinite"]).view(shape)


def unpacked_blocks(payload: torch.Tensor, entry: Entry) -> Iterator[torch.Tensor]:
    """The flat blocks of :func:`unpack`, each decoded in the place of the one before; at least one."""
    if entry["codec"] == RAW:
        yield from payload.reshape(-1).split(BLOCK_LENGTH)
        return
    codec, num_weights = CODECS[entry["codec"]], math.prod(entry["shape"])
    buffer = torch.empty(min(num_weights, BLOCK_LENGTH), dtype=torch.float32, device=payload.device)
    if not num_weights:
        yield buffer  # as torch splits an empty tensor
    for part in chunks(slice(0, num_weights), payload.device, BLOCK_LENGTH):
        block = buffer[: part.stop - part.start]
        codec.decode_into(
            block, payload, num_weights, entry["block_size"], entry["num_nonfinite"], part.start
        )
        yield block


def unpacked_part(payload: torch.Tensor, entry: Entry, part: slice) -> torch.Tensor:
    """A slice of the flat :func:`unpack`, from a multiple of :data:`BLOCK_LENGTH` on."""
    if entry["codec"] == RAW:
        return payload.reshape(-1)[part]
    block = torch.empty(part.stop - part.start, dtype=torch.float32, device=payload.device)
    codec, num_weights = CODECS[entry["codec"]], math.prod(entry["shape"])
    codec.decode_into(block, payload, num_weights, entry["block_size"], entry["num_nonfinite"], part.start)
    return block


def has_nonfinite(payload: torch.Tensor | None, entry: Entry) -> bool:
    """Whether a checked payload holds NaN or infinite weights; nothing is decoded.

    Args:
        payload: None where it is not in memory; then only what the entry tells is known.
        entry: its entry in the meta.
    """
    codec = None if entry["codec"] == RAW else CODECS[entry["codec"]]
    if codec is not None and not isinstance(codec, CastCodec):
        return bool(entry["num_nonfinite"])
    if payload is None:
        return False
    values = payload if codec is None else view_section(payload, codec.dtype)
    return values.is_floating_point() and not all(map(math.isfinite, ends_of(values)))


def num_wire_bytes(entry: Entry) -> int:
    """Size of the payload that a checked entry describes."""
    num_weights = math.prod(entry["shape"])
    if entry["codec"] == RAW:
        dtype: torch.dtype = getattr(torch, entry["dtype"])
        return num_weights * dtype.itemsize
    codec = CODECS[entry["codec"]]
    return codec.num_payload_bytes(num_weights, entry["block_size"], entry["num_nonfinite"])


def _described(
    codec: str,
    weights: torch.Tensor | MadeValues,
    marks: Mapping[str, bool] | None,
    dtype: torch.dtype | None = None,
) -> Entry:
    name = dtype_name(dtype or weights.dtype)
    return {"codec": codec, "dtype": name, "shape": list(weights.shape), **(marks or {})}


def crc32_of_entry(name: str, entry: Entry, payload: torch.Tensor) -> int:
    """Checksum of an entry: of its name and fields as JSON, in one form everywhere, then of its payload."""
    fields = {key: value for key, value in entry.items() if key != "crc32"}
    text = json.dumps([name, fields], sort_keys=True, separators=(",", ":"))
    return crc32_of(payload, zlib.crc32(text.encode()))


def to_numpy(weights: torch.Tensor) -> np.ndarray[Any, Any]:
    """A decoded tensor as an array that shares its memory."""
    array: np.ndarray[Any, Any] = weights.numpy()
    return array
