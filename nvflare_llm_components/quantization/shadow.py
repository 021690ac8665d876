"""The shadow: what every client has decoded so far, so that a broadcast need only carry the difference to it.

At 4 bits weights do not survive a broadcast; their change over a round does. Server and clients keep the same
bfloat16 tensors, the shadow, and a broadcast is one step of it::

    difference = nf4(weights - shadow)          travels
    shadow     = bfloat16(shadow + difference)  on the server and on every client, bit for bit

What a step leaves out is part of the next difference, so nothing is lost. A shadow is known by the CRC-32
of its bytes. A client that does not hold the shadow a step starts from (it joined late, missed a round or
lost its disk) gets the next shadow itself: an absolute message of two bytes a weight, and exact, since the
shadow is bfloat16.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.quantization.arrays import as_tensor, materialized
from nvflare_llm_components.quantization.cast import BF16
from nvflare_llm_components.quantization.lazy import restored
from nvflare_llm_components.quantization.message import (
    Message,
    MessageEncoder,
    check_message,
    decode_entries,
    marks_of,
)
from nvflare_llm_components.quantization.policy import CODECS, PrecisionPolicy
from nvflare_llm_components.quantization.tensor_file import TensorFile, TensorFileWriter
from nvflare_llm_components.quantization.traffic import Traffic
from nvflare_llm_components.quantization.wire import Entry, WireFormatError, unpack

SHADOW_NAME = "shadow.safetensors"
HEADER_FIELD = "shadow"
_MARK = {"shadow": True}


@dataclass
class ShadowStep:
    """One step of the server's shadow, and the messages that take a client along.

    Attributes:
        base: id of the shadow that `difference` starts from; None where there was none.
        new: id of the shadow after the step.
        difference: message for clients that hold `base`; without a base it lacks the shadowed parameters.
        policy: precision of each parameter.
        path: file of the new shadow.
    """

    base: str | None
    new: str
    difference: Message
    policy: PrecisionPolicy
    path: Path
    _absolute: Message | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def message_for(self, held: str | None) -> Message:
        """The message for a client that holds the shadow `held`, or none."""
        if self.base is not None and held == self.base:
            return self.difference
        with self._lock:
            self._absolute = self._absolute or self._encode_absolute()
            return self._absolute

    def _encode_absolute(self) -> Message:
        shadow, known = TensorFile(self.path), self.difference
        encoder = MessageEncoder(self.policy)
        for name in shadow:
            encoder.add_encoded(name, shadow.read(name), BF16, _MARK)
        for name in (name for name in known.values if name not in shadow):
            encoder.add_again(name, known)
        encoder.traffic.bytes_before = known.traffic.bytes_before
        encoder.traffic.error_energy = known.traffic.error_energy
        encoder.traffic.weight_energy = known.traffic.weight_energy
        return encoder.finish(shadow={"id": self.new, "base": None})


def advance(values: Mapping[str, Any], policy: PrecisionPolicy, folder: Path) -> ShadowStep:
    """Take the server's shadow one step towards `values`; the new one is on disk on return.

    Args:
        values: the global model: tensors, arrays or lazy values by parameter name.
        policy: what it gives to ``nf4`` is shadowed; the rest travels as it says.
        folder: where the shadow lives.
    """
    path = folder / SHADOW_NAME
    old = TensorFile.open_if_there(path)
    shapes = _shadowed_shapes(values, policy)
    if old is not None and any(old.shape_of(name) != shape for name, shape in shapes.items()):
        old = None
    encoder = MessageEncoder(policy)
    with TensorFileWriter(path, shapes, torch.bfloat16) as writer:
        for name in shapes:
            writer.write(name, _advance_one(encoder, name, values[name], old))
        for name in (name for name in values if name not in shapes):
            encoder.add(name, values[name])
        new = f"{writer.crc32:08x}"
        writer.commit(new)
    base = old.label if old else None
    return ShadowStep(base, new, encoder.finish(shadow={"id": new, "base": base}), policy, path)


def follow(
    values: Mapping[str, Any], header: Mapping[str, Any], folder: Path, dtype: torch.dtype | None, lazy: bool
) -> tuple[dict[str, Any], Traffic]:
    """Take a client's shadow along with a message of the server; the new one is on disk on return.

    Args:
        values: payloads by parameter name.
        header: the meta value that describes them, with the ids of the shadow before and after.
        folder: where the shadow lives.
        dtype: dtype of the floating-point results; None is float32.
        lazy: whether to hand over values that are read on `materialize()`.

    Raises:
        WireFormatError: where the message does not keep to the format, starts from a shadow that is not
            here, or does not lead to the shadow that it names. The shadow is left as it was then.
    """
    entries = check_message(values, header)
    new, base = _ids(header)
    path = folder / SHADOW_NAME
    old = _shadow_with(base, path)
    shapes = {name: tuple(entries[name]["shape"]) for name in sorted(entries) if _is_shadowed(entries[name])}
    with TensorFileWriter(path, shapes, torch.bfloat16) as writer:
        for name in shapes:
            step = unpack(_payload(values[name]), entries[name])
            writer.write(name, _stepped(old.read(name) if old else None, step))
        if f"{writer.crc32:08x}" != new:
            raise WireFormatError(f"The shadow should be {new} after this message. Found {writer.crc32:08x}.")
        writer.commit(new)
    result, traffic = decode_entries(values, entries, dtype, lazy, skip=set(shapes))
    shadow = TensorFile(path)
    for name in shapes:
        value = ShadowTensor(shadow, name, dtype)
        result[name] = value if lazy else value.materialize()
    return result, traffic


def held_shadow(folder: Path) -> str | None:
    """Id of the shadow that a site holds."""
    file = TensorFile.open_if_there(folder / SHADOW_NAME)
    return file.label if file else None


class ShadowTensor:
    """A parameter that is read from the shadow's file on `materialize()`."""

    def __init__(self, shadow: TensorFile, name: str, dtype: torch.dtype | None) -> None:
        self._shadow, self._name, self._dtype = shadow, name, dtype

    def materialize(self) -> torch.Tensor:
        """Read into a new float tensor."""
        return restored(self._shadow.read(self._name), self._dtype)


def _shadowed_shapes(values: Mapping[str, Any], policy: PrecisionPolicy) -> dict[str, tuple[int, ...]]:
    """Shapes in the order of their names: the id of a shadow must not depend on the order of a message."""
    shapes = {}
    for name in sorted(values):
        weights = as_tensor(materialized(values[name]))
        if weights is not None and policy.codec_of(name, weights) is CODECS["nf4"]:
            shapes[name] = tuple(weights.shape)
    return shapes


def _advance_one(encoder: MessageEncoder, name: str, value: object, old: TensorFile | None) -> torch.Tensor:
    """Add the difference of one parameter to the message and return its new shadow."""
    weights = _payload(value).cpu().float()
    if old is None:
        shadow = _stepped(None, weights)
        encoder.traffic.bytes_before += 4 * weights.numel()
    else:
        before = old.read(name)
        difference = weights - before.float()
        encoder.add_encoded(name, difference, CODECS["nf4"], {**marks_of(value), **_MARK}, measure=False)
        shadow = _stepped(before, unpack(encoder.values[name], encoder.entries[name]))
    encoder.traffic.count_error(weights, shadow)
    return shadow


def _stepped(before: torch.Tensor | None, step: torch.Tensor) -> torch.Tensor:
    """The shadow of one parameter after a step, bfloat16; a saturating cast, so that it stays finite."""
    total = step.float() if before is None else before.float().add_(step)
    return BF16.encode(total, None).payload.view(torch.bfloat16).view(total.shape)


def _payload(value: object) -> torch.Tensor:
    payload = as_tensor(materialized(value))
    assert payload is not None, "was checked"
    return payload


def _is_shadowed(entry: Entry) -> bool:
    return entry.get("shadow") is True


def _ids(header: Mapping[str, Any]) -> tuple[str, str | None]:
    ids = header.get(HEADER_FIELD)
    if not isinstance(ids, dict) or not isinstance(ids.get("id"), str):
        raise WireFormatError(f"Header field {HEADER_FIELD!r} should hold an id. Found {ids!r:.200}.")
    base = ids.get("base")
    return ids["id"], None if base is None else str(base)


def _shadow_with(base: str | None, path: Path) -> TensorFile | None:
    if base is None:
        return None
    old = TensorFile.open_if_there(path)
    if old is None or old.label != base:
        found = old.label if old else "none"
        raise WireFormatError(
            f"The message starts from shadow {base}. Found {found}. The task must be sent again, as a whole."
        )
    return old
