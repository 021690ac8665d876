"""The shadow: what every client has decoded so far, so that a broadcast need only carry the difference to it.

At 4 bits and less weights do not survive a broadcast; their change over a round does. Server and clients
keep the same bfloat16 tensors, the shadow, of all parameters whose codec is for differences, and a broadcast
is one step of it::

    difference = nf4(weights - shadow)          travels
    shadow     = bfloat16(shadow + difference)  on the server and on every client, bit for bit

What a step leaves out is part of the next difference, so nothing is lost. What is not finite in a shadow
counts as zero, so that a NaN is gone with the next step. A shadow is known by the CRC-32 of its bytes, and is
held against it before a step starts from it. A client that does not hold the shadow a step starts from (it
joined late, missed a round or lost its disk) gets the next shadow itself: an absolute message of two bytes a
weight, and exact, since the shadow is bfloat16.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.quantization.cast import BF16, bfloat16_of
from nvflare_llm_components.quantization.chunks import MadeValues
from nvflare_llm_components.quantization.codec import Codec
from nvflare_llm_components.quantization.kept import Checksum, checksum_of_file, open_kept
from nvflare_llm_components.quantization.lazy import RestoreDtype, dtype_after, restored
from nvflare_llm_components.quantization.message import (
    Message,
    MessageEncoder,
    check_message,
    decode_entries,
    marks_of,
)
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.quantization.traffic import Traffic
from nvflare_llm_components.quantization.wire import Entry, WireFormatError, unpacked_part
from nvflare_llm_components.tensors.convert import as_tensor, materialized
from nvflare_llm_components.tensors.lazy import LazyValue
from nvflare_llm_components.tensors.safetensors_file import Layout, TensorFile, TensorFileWriter
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tensors.threads import in_order

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
        dtypes: what the server had, by the name of a shadowed parameter.
    """

    base: str | None
    new: str
    difference: Message
    policy: PrecisionPolicy
    path: Path
    dtypes: Mapping[str, torch.dtype]
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
            encoder.add_encoded(name, shadow.read(name), BF16, _MARK, self.dtypes[name])
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
        policy: what it gives to a codec for differences is shadowed; the rest travels as it says.
        folder: where the shadow lives.
    """
    path = folder / SHADOW_NAME
    codecs, shapes, dtypes = _shadowed(values, policy)
    old = _sound(open_kept(path))
    if old is not None and any(old.shape_of(name) != shape for name, shape in shapes.items()):
        old = None
    encoder, checksum = MessageEncoder(policy), Checksum()
    with TensorFileWriter(path, _layout(shapes)) as writer:
        for name, codec in codecs.items():
            shadow = _advance_one(encoder, name, values[name], codec, old)
            writer.write_blocks(name, checksum.of(shadow))
        for name in (name for name in values if name not in shapes):
            encoder.add(name, values[name])
        new = checksum.text
        writer.commit(new, sync=False)  # what a power cut leaves of it does not have its checksum
    base = old.label if old else None
    return ShadowStep(base, new, encoder.finish(shadow={"id": new, "base": base}), policy, path, dtypes)


def follow(
    values: Mapping[str, Any], header: Mapping[str, Any], folder: Path, dtype: RestoreDtype, lazy: bool
) -> tuple[dict[str, Any], Traffic]:
    """Take a client's shadow along with a message of the server; the new one is on disk on return.

    Args:
        values: payloads by parameter name.
        header: the meta value that describes them, with the ids of the shadow before and after.
        folder: where the shadow lives.
        dtype: dtype of the floating-point results; None is float32, SOURCE what the sender had.
        lazy: whether to hand over values that are read on `materialize()`.

    Raises:
        WireFormatError: where the message does not keep to the format, starts from a shadow that is not
            here, or does not lead to the shadow that it names. The shadow is left as it was then, unless the
            disk has changed it: that one is removed, so that the next message is an absolute one.
    """
    entries = check_message(values, header)
    new, base = header[HEADER_FIELD]["id"], header[HEADER_FIELD].get("base")
    path = folder / SHADOW_NAME
    shapes = {name: tuple(entries[name]["shape"]) for name in sorted(entries) if _is_shadowed(entries[name])}
    old = _shadow_with(base, path, shapes)
    checksum = Checksum()
    with TensorFileWriter(path, _layout(shapes)) as writer:
        for name in shapes:
            step = _step_of(_payload(values[name]), entries[name])
            writer.write_blocks(name, checksum.of(_stepped(_base_of(old, name), step)))
        if checksum.text != new:
            if _sound(old) is None:
                path.unlink(missing_ok=True)
            raise WireFormatError(f"The shadow should be {new} after this message. Found {checksum.text}.")
        writer.commit(new, sync=False)
    result, traffic = decode_entries(values, entries, dtype, lazy, skip=set(shapes))
    shadow = TensorFile(path)
    for name in shapes:
        value = ShadowTensor(shadow, name, dtype_after(entries[name], dtype))
        result[name] = value if lazy else value.materialize()
    return result, traffic


def held_shadow(folder: Path) -> str | None:
    """Id of the shadow that a site holds, and that its disk has kept as it was; it is read for this."""
    file = _sound(open_kept(folder / SHADOW_NAME))
    return file.label if file else None


class ShadowTensor(LazyValue):
    """A parameter that is read from the shadow's file on `materialize()`."""

    def __init__(self, shadow: TensorFile, name: str, dtype: torch.dtype | None) -> None:
        self._shadow, self._name, self._dtype = shadow, name, dtype

    def materialize(self) -> torch.Tensor:
        """Read into a new float tensor."""
        return restored(self._shadow.read(self._name), self._dtype)

    @property
    def shape(self) -> torch.Size:
        """See :class:`LazyValue`."""
        return torch.Size(self._shadow.shape_of(self._name) or ())

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`LazyValue`."""
        return self._dtype or torch.float32


def _shadowed(
    values: Mapping[str, Any], policy: PrecisionPolicy
) -> tuple[dict[str, Codec], dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Codecs, shapes and dtypes in the order of names: an id must not depend on the order of a message."""
    codecs: dict[str, Codec] = {}
    shapes, dtypes = {}, {}
    for name in sorted(values):
        weights = as_tensor(materialized(values[name]))
        codec = None if weights is None else policy.codec_of(name, weights)
        if weights is not None and codec is not None and codec.is_for_differences:
            codecs[name], shapes[name], dtypes[name] = codec, tuple(weights.shape), weights.dtype
    return codecs, shapes, dtypes


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    return {name: (shape, torch.bfloat16) for name, shape in shapes.items()}


def _advance_one(
    encoder: MessageEncoder, name: str, value: object, codec: Codec, old: TensorFile | None
) -> Iterator[torch.Tensor]:
    """Add the difference of one parameter to the message, and make the blocks of its new shadow."""
    source = _payload(value)
    weights, base = MadeValues.of(source), _base_of(old, name)
    if base is None:
        step = weights
        encoder.traffic.bytes_before += 4 * weights.numel()
    else:
        difference = MadeValues(source.shape, lambda part: weights[part] - base[part])
        encoder.add_encoded(name, difference, codec, {**marks_of(value), **_MARK}, source.dtype)
        step = _step_of(encoder.values[name], encoder.entries[name])
    for part, shadow in zip(step.parts(), _stepped(base, step), strict=True):
        encoder.traffic.count_sample(weights, part, shadow)
        yield shadow


def _base_of(old: TensorFile | None, name: str) -> MadeValues | None:
    """What a step of one parameter starts from, with zeros for what is not finite."""
    if old is None:
        return None
    shadow = MadeValues.of(old.read(name))
    return MadeValues(shadow.shape, lambda part: shadow[part].nan_to_num_(0.0, 0.0, 0.0))


def _step_of(payload: torch.Tensor, entry: Entry) -> MadeValues:
    return MadeValues(torch.Size(entry["shape"]), lambda part: unpacked_part(payload, entry, part).float())


def _stepped(base: MadeValues | None, step: MadeValues) -> Iterator[torch.Tensor]:
    """Blocks of the shadow of one parameter after a step, bfloat16; a saturating cast."""

    def stepped(part: slice) -> torch.Tensor:
        total = step[part] if base is None else base[part].add_(step[part])
        return bfloat16_of(total)

    return in_order(stepped, step.parts())


def _sound(file: TensorFile | None) -> TensorFile | None:
    """A shadow whose bytes are those that it is known by, else None."""
    return file if file is not None and checksum_of_file(file) == file.label else None


def _payload(value: object) -> torch.Tensor:
    payload = as_tensor(materialized(value))
    assert payload is not None, "was checked"
    return payload


def _is_shadowed(entry: Entry) -> bool:
    return entry.get("shadow") is True


def _shadow_with(base: str | None, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> TensorFile | None:
    if base is None:
        return None
    old = open_kept(path)
    if old is None or old.label != base:
        found = old.label if old else "none"
        raise WireFormatError(
            f"The message starts from shadow {base}. Found {found}. The task must be sent again, as a whole."
        )
    for name, shape in shapes.items():
        if old.shape_of(name) != shape:
            raise WireFormatError(
                f"Parameter {printable(name)!r} of the message should be a step of {old.shape_of(name)}. "
                f"Found {shape}."
            )
    return old
