"""Error feedback: what rounding left out of one update travels with the next.

The residual of round r is the difference between the update that was meant and the one that the server
decodes. It is on disk before the message leaves. Whether the server takes the message is known later, so two
residuals are kept: that of the last update that was taken, and that of the last one that was sent. The next
update carries the residual of the last one that was *taken*; what was meant in rounds that were not taken is
gone with them. So of all updates that were taken the sum is exact, but for the last residual::

    sum of decoded = sum of meant - residual of the last

A residual is kept in bfloat16, half the disk of the model's: of each, 2**-8 at most is lost.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.quantization.cast import bfloat16_of
from nvflare_llm_components.quantization.chunks import MadeValues
from nvflare_llm_components.quantization.codec import Codec
from nvflare_llm_components.quantization.kept import open_kept
from nvflare_llm_components.quantization.message import Message, MessageEncoder, marks_of
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.quantization.wire import unpacked_part
from nvflare_llm_components.tensors.convert import as_tensor, materialized
from nvflare_llm_components.tensors.lazy import LazyValue
from nvflare_llm_components.tensors.safetensors_file import TensorFile, TensorFileWriter
from nvflare_llm_components.tensors.threads import in_order

_NAME = "residual_{}.safetensors"
_EARLIER_NAME = "residual.safetensors"  # of releases that kept one


@dataclass(frozen=True)
class Residual:
    """The residual on disk that may be used.

    Attributes:
        file: the tensors, or None.
        taken_round: round of the last update that the server took; None for none.
        dropped_rounds: rounds of residuals that may not be used and were not replaced by one that may.
    """

    file: TensorFile | None
    taken_round: int | None
    dropped_rounds: tuple[int, ...] = ()


def open_residual(folder: Path, taken_round: int | None) -> Residual:
    """The residual in a state folder that belongs to the last update that the server took."""
    files = _files(folder)
    file = files.get(taken_round) if taken_round is not None else None
    return Residual(file, taken_round, () if file else tuple(sorted(files)))


def encode_with_feedback(
    values: Mapping[str, Any], policy: PrecisionPolicy, folder: Path, current_round: int, residual: Residual
) -> Message:
    """Encode an update with the last one's residual added, and leave the new residual on disk.

    Args:
        values: the update: tensors, arrays or lazy values by parameter name.
        policy: precision of each parameter; those that travel as they are have no residual.
        folder: where the residual lives.
        current_round: round of this update; it comes after the one that was taken last.
        residual: what :func:`open_residual` found.
    """
    codecs = _codecs_of(values, policy)
    encoder = MessageEncoder(policy)
    layout = {name: (values[name].shape, torch.bfloat16) for name in codecs}
    _keep_only(folder, residual.taken_round)
    with TensorFileWriter(folder / _NAME.format(current_round), layout) as writer:
        for name, value in values.items():
            if name not in codecs:
                encoder.add(name, value)
                continue
            source = as_tensor(materialized(value))
            assert source is not None, "has a codec, so it is a tensor"
            meant = _meant(name, source, residual.file)
            encoder.add_encoded(name, meant, codecs[name], marks_of(value), source.dtype)
            writer.write_blocks(name, _left_out(encoder, name, meant))
        writer.commit(str(current_round))
    return encoder.finish()


def _files(folder: Path) -> dict[int, TensorFile]:
    """Residuals by round; what cannot be read is not there."""
    opened = [open_kept(path) for path in folder.glob(_NAME.format("*"))]
    opened.append(open_kept(folder / _EARLIER_NAME))
    return {int(file.label): file for file in opened if file is not None and file.label.isdecimal()}


def _keep_only(folder: Path, taken_round: int | None) -> None:
    """Remove what no later round can use. An open file stays readable."""
    for path in [*folder.glob(_NAME.format("*")), folder / _EARLIER_NAME]:
        file = open_kept(path)
        if file is None or file.label != str(taken_round):
            path.unlink(missing_ok=True)


def _codecs_of(values: Mapping[str, Any], policy: PrecisionPolicy) -> dict[str, Codec]:
    """Codec of each parameter that is rounded."""
    tensors = {n: value if isinstance(value, LazyValue) else as_tensor(value) for n, value in values.items()}
    codecs = {name: policy.codec_of(name, tensor) for name, tensor in tensors.items() if tensor is not None}
    return {name: codec for name, codec in codecs.items() if codec is not None}


def _meant(name: str, update: torch.Tensor, residual: TensorFile | None) -> MadeValues:
    """The update with what was left out of the last one."""
    alone = MadeValues.of(update)
    if residual is None or residual.shape_of(name) != tuple(update.shape):
        return alone
    carried = MadeValues.of(residual.read(name))
    return MadeValues(update.shape, lambda part: alone[part] + carried[part])


def _left_out(encoder: MessageEncoder, name: str, meant: MadeValues) -> Iterator[torch.Tensor]:
    """Blocks of the difference between an update and what the server decodes; 0 for what is not finite."""
    payload, entry = encoder.values[name], encoder.entries[name]

    def left_out(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        arrived = unpacked_part(payload, entry, part)
        return arrived, bfloat16_of((meant[part] - arrived).nan_to_num_(0.0, 0.0, 0.0))

    for part, (arrived, error) in zip(meant.parts(), in_order(left_out, meant.parts()), strict=True):
        encoder.traffic.count_sample(meant, part, arrived)
        yield error
