"""A whole state dict on the wire: encode, check, decode, and what it cost.

All functions are pure: they return new dicts and never write to a value they are given.
"""

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nvflare_llm_components.quantization.checks import FORMAT_VERSION, check, check_header, shown
from nvflare_llm_components.quantization.chunks import MadeValues
from nvflare_llm_components.quantization.codec import Codec
from nvflare_llm_components.quantization.lazy import LazyTensor, RestoreDtype, decoded, dtype_after
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.quantization.traffic import Traffic
from nvflare_llm_components.quantization.wire import (
    RAW,
    Entry,
    WireFormatError,
    num_wire_bytes,
    pack,
    pack_raw,
)
from nvflare_llm_components.tensors.convert import as_tensor, materialize_of, materialized, nbytes_of

META_KEY = "nvflare_llm_precision"


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

    def message_for(self, held: str | None) -> "Message":
        """The message for any client: itself. See :class:`.shadow.ShadowStep` for one that differs."""
        return self


class MessageEncoder:
    """Collects a message tensor by tensor.

    Args:
        policy: precision of each parameter.

    Attributes:
        values: payloads so far, by parameter name.
        entries: their entries in the meta.
        traffic: what it cost so far.
    """

    def __init__(self, policy: PrecisionPolicy) -> None:
        self.policy = policy
        self.values: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.traffic = Traffic()
        self._start = time.perf_counter()

    def add(self, name: str, value: object) -> None:
        """Add a tensor, array or lazy value at the precision of the policy; anything else passes as it is."""
        source = materialized(value)
        weights = as_tensor(source)
        if weights is None:
            self.values[name] = source
            return
        codec = self.policy.codec_of(name, weights)
        if codec is not None:
            self.add_encoded(name, weights, codec, marks_of(source))
            return
        payload, entry = pack_raw(name, weights, marks_of(source))
        self._put(name, weights, payload, entry)
        if isinstance(source, np.ndarray):
            self.values[name] = source

    def add_encoded(
        self,
        name: str,
        weights: torch.Tensor | MadeValues,
        codec: Codec,
        marks: Mapping[str, bool],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add a floating-point tensor encoded by `codec`.

        Args:
            name: of the parameter.
            weights: its values; of those that are made as they are read the error is not measured.
            codec: what encodes them.
            marks: flags of its entry.
            dtype: what the sender had, where `weights` are made of it; None is theirs.
        """
        payload, entry, encoded = pack(name, weights, codec, self.policy.block_size, marks, dtype)
        self._put(name, weights, payload, entry)
        self.traffic.num_encoded += 1
        self.traffic.num_saturated += encoded.num_saturated
        self.traffic.num_nonfinite += encoded.num_nonfinite
        if isinstance(weights, torch.Tensor):
            self.traffic.measure_error(weights, codec, entry["block_size"])

    def add_again(self, name: str, message: "Message") -> None:
        """Add a value of another message of this policy, with its entry."""
        self.values[name] = message.values[name]
        entry = message.header["params"].get(name)
        if entry is not None:
            self.entries[name] = entry
            size = num_wire_bytes(entry)
            self.traffic.bytes_after += size
            self.traffic.bytes_by_precision[entry["codec"]] += size

    def finish(self, **header: object) -> Message:
        """The message, with further fields of its header."""
        self.traffic.num_params = len(self.entries)
        self.traffic.seconds = time.perf_counter() - self._start
        fields = {"version": FORMAT_VERSION, "precision": self.policy.precision, "params": self.entries}
        return Message(self.values, {**fields, **header}, self.traffic)

    def _put(
        self, name: str, weights: torch.Tensor | MadeValues, payload: torch.Tensor, entry: Entry
    ) -> None:
        self.values[name], self.entries[name] = payload, entry
        self.traffic.bytes_before += weights.numel() * weights.element_size()
        self.traffic.bytes_after += nbytes_of(payload)
        self.traffic.bytes_by_precision[entry["codec"]] += nbytes_of(payload)


def marks_of(source: object) -> dict[str, bool]:
    """Flags of an entry that tell what container the sender had."""
    return {"numpy": True} if isinstance(source, np.ndarray) else {}


def encode_message(values: Mapping[str, Any], policy: PrecisionPolicy) -> Message:
    """Encode a state dict of tensors, arrays or lazy values, one at a time."""
    encoder = MessageEncoder(policy)
    for name, value in values.items():
        encoder.add(name, value)
    return encoder.finish()


def decode_message(
    values: Mapping[str, Any], header: object, restore_dtype: RestoreDtype, lazy: bool
) -> tuple[dict[str, Any], Traffic]:
    """Check a whole message, then decode it.

    Args:
        values: payloads by parameter name.
        header: the meta value that describes them.
        restore_dtype: dtype of the floating-point results; None is float32, SOURCE what the sender had.
        lazy: whether to hand over :class:`.lazy.LazyTensor` in place of tensors. Arrays are decoded at once.

    Raises:
        WireFormatError: for a message that does not keep to the format, or that is a step of a shadow;
            nothing has been decoded then.
    """
    entries = check_message(values, header)
    assert isinstance(header, dict), "was checked"
    if header.get("shadow") is not None:
        raise WireFormatError(
            "The message should be complete: only a server's broadcast is a step of a shadow. "
            "Found a field `shadow` in its header."
        )
    return decode_entries(values, entries, restore_dtype, lazy)


def decode_entries(
    values: Mapping[str, Any],
    entries: Mapping[str, Entry],
    restore_dtype: RestoreDtype,
    lazy: bool,
    skip: Collection[str] = (),
) -> tuple[dict[str, Any], Traffic]:
    """Decode a checked message, see :func:`decode_message`; what is in `skip` is only counted."""
    start, traffic = time.perf_counter(), Traffic(num_params=len(entries))
    result: dict[str, Any] = {}
    for name, value in values.items():
        entry = entries.get(name)
        if entry is not None:
            _count_decoded(entry, traffic)
        if entry is None or name in skip:
            result[name] = value
        elif lazy and entry.get("numpy") is not True:
            result[name] = LazyTensor(value, entry, dtype_after(entry, restore_dtype))
        else:
            result[name] = decoded(value, entry, dtype_after(entry, restore_dtype))
    traffic.seconds = time.perf_counter() - start
    return result, traffic


def check_message(values: Mapping[str, Any], header: object) -> dict[str, Entry]:
    """The entries of a message, once every one of them holds; see :func:`.wire.check`.

    Raises:
        WireFormatError: naming what was expected and what was found.
    """
    entries = check_header(header, META_KEY)
    assert isinstance(header, dict), "was checked"
    missing = sorted(set(entries) - set(values))
    if missing:
        raise WireFormatError(
            f"The message should hold every parameter it describes. Missing: {shown(missing[:5])}."
        )
    marked = [name for name, entry in entries.items() if "shadow" in entry]
    if marked and header.get("shadow") is None:
        raise WireFormatError(
            f"A message that is no step of a shadow should mark no parameter. Found {shown(marked[:5])}."
        )
    for name, value in values.items():
        if name in entries:
            check(name, entries[name], materialized(value))
        elif as_tensor(value) is not None or materialize_of(value):
            raise WireFormatError(
                f"Parameter {shown(name)} of the message should be described in {META_KEY!r}."
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
