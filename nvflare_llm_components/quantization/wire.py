"""One tensor on the wire: its payload, its entry in the meta, and the checks of both.

An entry is a dict of builtins. For an encoded tensor::

    {"codec": "int8", "dtype": "float32", "shape": [2048, 8192], "block_size": 128, "num_nonfinite": 0,
     "crc32": 305419896}

and its payload is a contiguous 1-D uint8 tensor. For a tensor sent as it is, ``codec`` is ``raw``, the
payload is the tensor itself, and ``block_size`` and ``num_nonfinite`` are absent.
"""

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nvflare_llm_components.quantization.arrays import as_tensor
from nvflare_llm_components.quantization.blocks import check_block_size, split_nonfinite, view_section
from nvflare_llm_components.quantization.cast import CastCodec
from nvflare_llm_components.quantization.codec import Codec, Encoded
from nvflare_llm_components.quantization.policy import CODECS

RAW = "raw"
_MAX_DIMS = 64
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
    weights: torch.Tensor,
    codec: Codec,
    block_size: int | None,
    marks: Mapping[str, bool] | None = None,
) -> tuple[torch.Tensor, Entry, Encoded]:
    """Encode a tensor.

    Args:
        name: parameter name, which the checksum covers.
        weights: floating-point tensor of any shape and device.
        codec: what encodes it.
        block_size: weights that share a scale; None is the codec's default.
        marks: further flags of the entry.

    Returns:
        Its payload on the CPU, its entry, and what the codec reported.
    """
    size = None if codec.default_block_size is None else block_size or codec.default_block_size
    encoded = codec.encode(weights, size)
    payload = encoded.payload.cpu()
    entry = _described(codec.name, weights, marks)
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
    return {**entry, "crc32": _crc32(name, entry, payload)}


def check(name: str, entry: object, value: object) -> torch.Tensor:
    """The payload of an entry, once everything that the entry says about it holds.

    Nothing is allocated for what an entry declares.

    Args:
        name: parameter name, for the error.
        entry: what the meta says.
        value: what arrived: a tensor or an array, not lazy.

    Raises:
        WireFormatError: naming the parameter, what was expected and what was found.
    """
    try:
        return _checked(name, entry, value)
    except (TypeError, ValueError) as e:
        raise WireFormatError(f"Parameter {name!r} of the message is refused: {e}") from e


def unpack(payload: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Decode a checked payload: float32 in its shape; a raw tensor comes as it is."""
    if entry["codec"] == RAW:
        return payload
    shape = tuple(entry["shape"])
    codec = CODECS[entry["codec"]]
    flat = codec.decode(payload, math.prod(shape), entry["block_size"], entry["num_nonfinite"])
    return flat.view(shape)


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
    if not values.is_floating_point() or values.numel() == 0:
        return False
    # One pass without a temporary the size of the tensor; both ends of a range with a NaN are NaN.
    return not bool(torch.stack(torch.aminmax(values)).isfinite().all())


def num_wire_bytes(entry: Entry) -> int:
    """Size of the payload that a checked entry describes."""
    num_weights = math.prod(entry["shape"])
    if entry["codec"] == RAW:
        dtype: torch.dtype = getattr(torch, entry["dtype"])
        return num_weights * dtype.itemsize
    codec = CODECS[entry["codec"]]
    return codec.num_payload_bytes(num_weights, entry["block_size"], entry["num_nonfinite"])


def _checked(name: str, entry: object, value: object) -> torch.Tensor:
    if not isinstance(entry, dict):
        raise ValueError(f"its entry should be a dict. Found {type(entry).__name__}.")
    payload = as_tensor(value)
    if payload is None:
        raise ValueError(f"its payload should be a tensor. Found {type(value).__name__}.")
    _check_shape(entry.get("shape"))
    if entry.get("codec") == RAW:
        _check_raw(entry, payload)
    else:
        _check_encoded(entry, payload)
    if entry.get("crc32") != (found := _crc32(name, entry, payload)):
        raise ValueError(f"its checksum should be {entry.get('crc32')!r}. Found {found}.")
    if entry["codec"] != RAW:
        _check_positions(entry, payload)
    return payload


def _described(codec: str, weights: torch.Tensor, marks: Mapping[str, bool] | None) -> Entry:
    return {"codec": codec, "dtype": dtype_name(weights.dtype), "shape": list(weights.shape), **(marks or {})}


def _crc32(name: str, entry: Entry, payload: torch.Tensor) -> int:
    """Fields are in the order of their names, as JSON without spaces: the same bytes everywhere."""
    fields = {key: value for key, value in entry.items() if key != "crc32"}
    text = json.dumps([name, fields], sort_keys=True, separators=(",", ":"))
    return crc32_of(payload, zlib.crc32(text.encode()))


def _check_shape(shape: object) -> None:
    ok = isinstance(shape, list | tuple) and len(shape) <= _MAX_DIMS and all(_is_count(n) for n in shape)
    if not ok:
        raise ValueError(f"shape should be a list of sizes. Found {shape!r:.200}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_raw(entry: Entry, payload: torch.Tensor) -> None:
    found = (dtype_name(payload.dtype), list(payload.shape))
    expected = (entry.get("dtype"), list(entry["shape"]))
    if found != expected:
        raise ValueError(f"dtype and shape should be {expected!r:.200}. Found {found}.")


def _check_encoded(entry: Entry, payload: torch.Tensor) -> None:
    name = entry.get("codec")
    codec = CODECS.get(name) if isinstance(name, str) else None
    if codec is None:
        raise ValueError(f"codec should be one of {', '.join([RAW, *CODECS])}. Found {name!r:.200}.")
    if entry.get("dtype") not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"dtype should be a 16 to 64 bit float. Found {entry.get('dtype')!r:.200}.")
    _check_block_size_of(codec, entry.get("block_size"))
    num_weights, num_nonfinite = math.prod(entry["shape"]), entry.get("num_nonfinite", -1)
    if not _is_count(num_nonfinite) or num_nonfinite > (num_weights if codec.default_block_size else 0):
        raise ValueError(f"num_nonfinite should be a count of its weights. Found {num_nonfinite!r:.200}.")
    expected = codec.num_payload_bytes(num_weights, entry["block_size"], num_nonfinite)
    if payload.dtype != torch.uint8 or payload.shape != (expected,) or not payload.is_contiguous():
        found = f"{dtype_name(payload.dtype)} {list(payload.shape)}"
        raise ValueError(f"its payload should be uint8 [{expected}], contiguous. Found {found}.")


def _check_block_size_of(codec: Codec, block_size: object) -> None:
    if codec.default_block_size is None and block_size is None:
        return
    if codec.default_block_size is None or not isinstance(block_size, int):
        raise ValueError(f"block_size of {codec.name} is not what it may be. Found {block_size!r:.200}.")
    check_block_size(block_size)


def _check_positions(entry: Entry, payload: torch.Tensor) -> None:
    positions = split_nonfinite(payload, entry["num_nonfinite"])[0]
    size = math.prod(entry["shape"])
    if positions.numel() and not bool(((positions >= 0) & (positions < size)).all()):
        raise ValueError(f"positions of non-finite weights should be below {size}. Found one that is not.")


def to_numpy(weights: torch.Tensor) -> np.ndarray[Any, Any]:
    """A decoded tensor as an array that shares its memory."""
    array: np.ndarray[Any, Any] = weights.numpy()
    return array
