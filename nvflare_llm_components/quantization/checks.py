"""What a message must keep to before anything of it is decoded.

A header and its entries come from another site. They are held against lists of what may be there, so that a
field that we do not know, or that we know with another type, is refused rather than carried along.
"""

import math
import re
import reprlib
from typing import Any

import torch

from nvflare_llm_components.quantization.blocks import check_block_size
from nvflare_llm_components.quantization.codec import Codec
from nvflare_llm_components.quantization.precision import CODECS, PRECISIONS
from nvflare_llm_components.quantization.wire import RAW, Entry, WireFormatError, crc32_of_entry, dtype_name
from nvflare_llm_components.tensors.convert import as_tensor
from nvflare_llm_components.tensors.safetensors_file import METADATA
from nvflare_llm_components.tensors.text import printable

FORMAT_VERSION = 1
_HEADER_FIELDS = {"version", "precision", "params", "taken_round", "shadow"}
_SHADOW_FIELDS = {"id", "base"}
_RAW_FIELDS = {"codec", "dtype", "shape", "crc32"}
_ENCODED_FIELDS = _RAW_FIELDS | {"block_size", "num_nonfinite"}
_FLAGS = {"numpy", "shadow"}
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_SHADOW_ID = re.compile(r"[0-9a-f]{8}")
_MAX_DIMS = 64
_MAX_WEIGHTS = 1 << 40  # of one parameter, an empty dimension counted as one
_MAX_NAME = 1000  # characters
_MAX_ROUND = 1 << 31


def shown(value: object) -> str:
    """A value from outside as an error shows it: one line, bounded however deep or long it is."""
    try:
        return printable(reprlib.repr(value), 200)
    except Exception:  # such as a RecursionError, or an integer too long to be written
        return f"<{type(value).__name__}>"


def check_header(header: object, where: str) -> dict[str, Entry]:
    """The entries of a header whose own fields are what they may be.

    Args:
        header: the meta value that describes a message.
        where: meta key, for the error.

    Raises:
        WireFormatError: naming the field, what was expected and what was found.
    """
    version = header.get("version") if isinstance(header, dict) else None
    if not isinstance(header, dict) or isinstance(version, bool) or version != FORMAT_VERSION:
        found = shown(version if isinstance(header, dict) else type(header).__name__)
        raise WireFormatError(
            f"Meta {where!r} should be of version {FORMAT_VERSION}. Found {found}. "
            "Install the same release of nvflare_llm_components on every site."
        )
    entries = header.get("params")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise WireFormatError(f"Meta {where!r} should describe its parameters in a dict `params` of dicts.")
    try:
        _check_fields(header, _HEADER_FIELDS)
        _check_header_fields(header)
        _check_names(entries)
    except ValueError as e:
        raise WireFormatError(f"Meta {where!r} of the message is refused: {e}") from e
    return entries


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
        raise WireFormatError(f"Parameter {printable(name)!r} of the message is refused: {e}") from e


def _check_fields(fields: dict[str, Any], allowed: set[str]) -> None:
    unknown = [key for key in fields if key not in allowed]
    if unknown:
        raise ValueError(f"its fields should be among {', '.join(sorted(allowed))}. Found {shown(unknown)}.")


def _check_header_fields(header: dict[str, Any]) -> None:
    precision, taken, ids = (header.get(key) for key in ("precision", "taken_round", "shadow"))
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision should be one of {', '.join(PRECISIONS)}. Found {shown(precision)}.")
    if taken is not None and not (_is_count(taken) and taken < _MAX_ROUND):
        raise ValueError(f"taken_round should be the number of a round, or None. Found {shown(taken)}.")
    if ids is None:
        return
    if not isinstance(ids, dict) or not _is_shadow_id(ids.get("id")):
        raise ValueError(f"shadow should hold an id of eight hex digits. Found {shown(ids)}.")
    _check_fields(ids, _SHADOW_FIELDS)
    if ids.get("base") is not None and not _is_shadow_id(ids["base"]):
        raise ValueError(f"the base of its shadow should be eight hex digits. Found {shown(ids['base'])}.")


def _check_names(entries: dict[str, Entry]) -> None:
    for name in entries:
        if not isinstance(name, str) or len(name) > _MAX_NAME:
            raise ValueError(f"names should be of at most {_MAX_NAME} characters. Found {shown(name)}.")
        if name == METADATA:
            raise ValueError(f"no parameter should be named {METADATA!r}, which a kept file's header needs.")


def _is_shadow_id(value: object) -> bool:
    return isinstance(value, str) and _SHADOW_ID.fullmatch(value) is not None


def _checked(name: str, entry: object, value: object) -> torch.Tensor:
    if not isinstance(entry, dict):
        raise ValueError(f"its entry should be a dict. Found {type(entry).__name__}.")
    payload = as_tensor(value)
    if payload is None:
        raise ValueError(f"its payload should be a tensor. Found {type(value).__name__}.")
    _check_shape(entry.get("shape"))
    codec = None if entry.get("codec") == RAW else _codec_of(entry.get("codec"))
    _check_fields(entry, (_ENCODED_FIELDS if codec else _RAW_FIELDS) | _FLAGS)
    for flag in _FLAGS & entry.keys():
        if entry[flag] is not True:
            raise ValueError(f"{flag} should be true where it is there. Found {shown(entry[flag])}.")
    if codec is None:
        _check_raw(entry, payload)
    else:
        _check_encoded(codec, entry, payload)
    if entry.get("crc32") != (found := crc32_of_entry(name, entry, payload)):
        raise ValueError(f"its checksum should be {shown(entry.get('crc32'))}. Found {found}.")
    if codec is not None:
        codec.check(payload, math.prod(entry["shape"]), entry["block_size"], entry["num_nonfinite"])
    return payload


def _check_shape(shape: object) -> None:
    ok = isinstance(shape, list | tuple) and len(shape) <= _MAX_DIMS and all(_is_count(n) for n in shape)
    if not ok:
        raise ValueError(f"shape should be a list of sizes. Found {shown(shape)}.")
    assert isinstance(shape, list | tuple)
    if math.prod(max(size, 1) for size in shape) > _MAX_WEIGHTS:
        raise ValueError(f"shape should be of at most {_MAX_WEIGHTS} weights. Found {shown(shape)}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _codec_of(name: object) -> Codec:
    codec = CODECS.get(name) if isinstance(name, str) else None
    if codec is None:
        raise ValueError(f"codec should be one of {', '.join([RAW, *CODECS])}. Found {shown(name)}.")
    return codec


def _check_raw(entry: Entry, payload: torch.Tensor) -> None:
    found = (dtype_name(payload.dtype), list(payload.shape))
    expected = (entry.get("dtype"), list(entry["shape"]))
    if found != expected:
        raise ValueError(f"dtype and shape should be {shown(expected)}. Found {shown(found)}.")


def _check_encoded(codec: Codec, entry: Entry, payload: torch.Tensor) -> None:
    if entry.get("dtype") not in _FLOATS:
        raise ValueError(f"dtype should be a 16 to 64 bit float. Found {shown(entry.get('dtype'))}.")
    _check_block_size_of(codec, entry.get("block_size"))
    num_weights, num_nonfinite = math.prod(entry["shape"]), entry.get("num_nonfinite", -1)
    if not _is_count(num_nonfinite) or num_nonfinite > (num_weights if codec.default_block_size else 0):
        raise ValueError(f"num_nonfinite should be a count of its weights. Found {shown(num_nonfinite)}.")
    expected = codec.num_payload_bytes(num_weights, entry["block_size"], num_nonfinite)
    if payload.dtype != torch.uint8 or payload.shape != (expected,) or not payload.is_contiguous():
        found = f"{dtype_name(payload.dtype)} {shown(list(payload.shape))}"
        raise ValueError(f"its payload should be uint8 [{expected}], contiguous. Found {found}.")


def _check_block_size_of(codec: Codec, block_size: object) -> None:
    if codec.default_block_size is None and block_size is None:
        return
    if codec.default_block_size is None or not isinstance(block_size, int):
        raise ValueError(f"block_size of {codec.name} is not what it may be. Found {shown(block_size)}.")
    check_block_size(block_size)
