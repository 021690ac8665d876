"""A whole state dict on the wire: encode, check, decode, and what it cost.

All functions are pure: they return new dicts and never write to a value they are given.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nvflare_llm_components.quantization.arrays import as_tensor, materialize_of, materialized, nbytes_of
from nvflare_llm_components.quantization.codec import Codec
from nvflare_llm_components.quantization.lazy import LazyTensor, decoded
from nvflare_llm_components.quantization.policy import PrecisionPolicy
from nvflare_llm_components.quantization.wire import (
    RAW,
    Entry,
    WireFormatError,
    check,
    num_wire_bytes,
    pack,
    pack_raw,
    unpack,
)

META_KEY = "nvflare_llm_precision"
FORMAT_VERSION = 1
_SAMPLE = 1 << 16  # weights of a tensor on which its error is measured: a whole number of superblocks


@dataclass
class Traffic:
    """What one application of a filter did, in bytes and errors.

    Attributes:
        num_params: tensors in the message.
        num_encoded: those among them that were encoded, not sent as they are.
        bytes_before: size before the application.
        bytes_after: size after it.
        bytes_by_precision: size on the wire by codec; ``raw`` is what travels as it is.
        num_saturated: finite weights beyond the range of their format.
        num_nonfinite: NaN and infinite weights of blockwise encoded tensors.
        seconds: wall time.
        error_energy: sum of squared errors, estimated.
        weight_energy: sum of squared weights, estimated.
    """

    num_params: int = 0
    num_encoded: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bytes_by_precision: Counter[str] = field(default_factory=Counter)
    num_saturated: int = 0
    num_nonfinite: int = 0
    seconds: float = 0.0
    error_energy: float = 0.0
    weight_energy: float = 0.0

    @property
    def relative_error(self) -> float:
        """Norm of the error over the norm of the weights; 0 where there are no weights."""
        return math.sqrt(self.error_energy / self.weight_energy) if self.weight_energy else 0.0


@dataclass(frozen=True)
class Message:
    """An encoded state dict.

    Attributes:
        values: payload tensors by parameter name; what is no tensor is passed on.
        header: the meta value that describes them, of builtins only.
        traffic: what encoding did.
    """

    values: dict[str, Any]
    header: dict[str, Any]
    traffic: Traffic


def encode_message(values: Mapping[str, Any], policy: PrecisionPolicy) -> Message:
    """Encode a state dict of tensors, arrays or lazy values, one at a time."""
    start, traffic = time.perf_counter(), Traffic()
    payloads: dict[str, Any] = {}
    entries: dict[str, Entry] = {}
    for name, value in values.items():
        source = materialized(value)
        weights = as_tensor(source)
        if weights is None:
            payloads[name] = source
            continue
        payload, entry = _encode_one(name, weights, policy, traffic)
        is_numpy = isinstance(source, np.ndarray)
        entries[name] = {**entry, "numpy": is_numpy}
        payloads[name] = source if is_numpy and entry["codec"] == RAW else payload
        traffic.bytes_before += nbytes_of(weights)
        traffic.bytes_after += nbytes_of(payload)
        traffic.bytes_by_precision[entry["codec"]] += nbytes_of(payload)
    traffic.num_params = len(entries)
    traffic.seconds = time.perf_counter() - start
    header = {"version": FORMAT_VERSION, "precision": policy.precision, "params": entries}
    return Message(payloads, header, traffic)


def decode_message(
    values: Mapping[str, Any], header: object, restore_dtype: torch.dtype | None, lazy: bool
) -> tuple[dict[str, Any], Traffic]:
    """Check a whole message, then decode it.

    Args:
        values: payloads by parameter name.
        header: the meta value that describes them.
        restore_dtype: dtype of the floating-point results; None is float32.
        lazy: whether to hand over :class:`.lazy.LazyTensor` in place of tensors. Arrays are decoded at once.

    Raises:
        WireFormatError: for a message that does not keep to the format; nothing has been decoded then.
    """
    start, traffic = time.perf_counter(), Traffic()
    entries = check_message(values, header)
    result: dict[str, Any] = {}
    for name, value in values.items():
        entry = entries.get(name)
        if entry is None:
            result[name] = value
            continue
        wants_lazy = lazy and entry.get("numpy") is not True
        make = LazyTensor if wants_lazy else decoded
        result[name] = make(value, entry, restore_dtype)
        _count_decoded(entry, traffic)
    traffic.num_params = len(entries)
    traffic.seconds = time.perf_counter() - start
    return result, traffic


def check_message(values: Mapping[str, Any], header: object) -> dict[str, Entry]:
    """The entries of a message, once every one of them holds; see :func:`.wire.check`.

    Raises:
        WireFormatError: naming what was expected and what was found.
    """
    entries = _entries(header)
    missing = sorted(set(entries) - set(values))
    if missing:
        raise WireFormatError(
            f"The message should hold every parameter it describes. Missing: {missing[:5]}."
        )
    for name, value in values.items():
        if name in entries:
            check(name, entries[name], materialized(value))
        elif as_tensor(value) is not None or materialize_of(value):
            raise WireFormatError(f"Parameter {name!r} of the message should have an entry in {META_KEY!r}.")
    return entries


def _encode_one(
    name: str, weights: torch.Tensor, policy: PrecisionPolicy, traffic: Traffic
) -> tuple[torch.Tensor, Entry]:
    codec = policy.codec_of(name, weights)
    if codec is None:
        return pack_raw(weights)
    payload, entry, encoded = pack(weights, codec, policy.block_size)
    traffic.num_encoded += 1
    traffic.num_saturated += encoded.num_saturated
    traffic.num_nonfinite += encoded.num_nonfinite
    _measure_error(weights, codec, policy.block_size, traffic)
    return payload, entry


def _measure_error(weights: torch.Tensor, codec: Codec, block_size: int | None, traffic: Traffic) -> None:
    """Estimate the error on the first weights of a tensor: a full decode would cost as much as encoding."""
    sample = weights.reshape(-1)[:_SAMPLE].float()
    if not sample.numel():
        return
    payload, entry, _ = pack(sample, codec, block_size)
    finite = sample.isfinite()
    source = sample[finite].double()
    error = unpack(payload, entry).to(sample.device)[finite].double() - source
    share = weights.numel() / sample.numel()
    traffic.error_energy += share * float(error.square().sum())
    traffic.weight_energy += share * float(source.square().sum())


def _entries(header: object) -> dict[str, Entry]:
    if not isinstance(header, dict) or header.get("version") != FORMAT_VERSION:
        found = header.get("version") if isinstance(header, dict) else type(header).__name__
        raise WireFormatError(
            f"Meta {META_KEY!r} should be of version {FORMAT_VERSION}. Found {found!r:.200}. "
            "Install the same release of nvflare_llm_components on every site."
        )
    entries = header.get("params")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise WireFormatError(
            f"Meta {META_KEY!r} should describe its parameters in a dict `params` of dicts."
        )
    return entries


def _count_decoded(entry: Entry, traffic: Traffic) -> None:
    num_weights = math.prod(entry["shape"])
    wire_bytes = num_wire_bytes(entry)
    traffic.bytes_by_precision[entry["codec"]] += wire_bytes
    traffic.bytes_before += wire_bytes
    traffic.bytes_after += wire_bytes if entry["codec"] == RAW else 4 * num_weights
    traffic.num_encoded += entry["codec"] != RAW
    traffic.num_nonfinite += entry.get("num_nonfinite", 0)
