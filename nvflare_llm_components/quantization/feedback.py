"""Error feedback: what rounding left out of one update travels with the next.

The residual of round r is the difference between the update that was meant and the one that was decoded. It
is on disk before the message leaves, and is used once, only when the server is known to have taken the
update of round r; otherwise that part of the update is gone with the round, and its residual with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.quantization.arrays import as_tensor
from nvflare_llm_components.quantization.codec import Codec
from nvflare_llm_components.quantization.message import Message, MessageEncoder, marks_of
from nvflare_llm_components.quantization.policy import PrecisionPolicy
from nvflare_llm_components.quantization.tensor_file import TensorFile, TensorFileWriter
from nvflare_llm_components.quantization.wire import unpack

RESIDUAL_NAME = "residual.safetensors"


@dataclass(frozen=True)
class Residual:
    """The residual on disk, if it may be used.

    Attributes:
        file: the tensors, or None.
        dropped_round: round of a residual that may not be used; None where there is none.
    """

    file: TensorFile | None
    dropped_round: int | None = None


def open_residual(folder: Path, taken_round: int | None) -> Residual:
    """The residual in a state folder, if it belongs to the last update that the server took."""
    file = TensorFile.open_if_there(folder / RESIDUAL_NAME)
    if file is None:
        return Residual(None)
    residual_round = int(file.label)
    return Residual(file) if residual_round == taken_round else Residual(None, residual_round)


def encode_with_feedback(
    values: Mapping[str, Any], policy: PrecisionPolicy, folder: Path, current_round: int, residual: Residual
) -> Message:
    """Encode an update with the last one's residual added, and leave the new residual on disk.

    Args:
        values: the update: tensors, arrays or lazy values by parameter name.
        policy: precision of each parameter; those that travel as they are have no residual.
        folder: where the residual lives.
        current_round: round of this update.
        residual: what :func:`open_residual` found.
    """
    codecs = _codecs_of(values, policy)
    encoder = MessageEncoder(policy)
    shapes = {name: values[name].shape for name in codecs}
    with TensorFileWriter(folder / RESIDUAL_NAME, shapes, torch.float32) as writer:
        for name, value in values.items():
            if name not in codecs:
                encoder.add(name, value)
                continue
            meant = _meant(name, value, residual.file)
            encoder.add_encoded(name, meant, codecs[name], marks_of(value), measure=False)
            arrived = unpack(encoder.values[name], encoder.entries[name])
            encoder.traffic.count_error(meant, arrived)
            error = meant - arrived
            writer.write(name, error.nan_to_num_(0.0, 0.0, 0.0))
        writer.commit(str(current_round))
    return encoder.finish()


def _codecs_of(values: Mapping[str, Any], policy: PrecisionPolicy) -> dict[str, Codec]:
    """Codec of each parameter that is rounded. A lazy value is not: it is no update of this process."""
    tensors = {name: as_tensor(value) for name, value in values.items()}
    codecs = {name: policy.codec_of(name, tensor) for name, tensor in tensors.items() if tensor is not None}
    return {name: codec for name, codec in codecs.items() if codec is not None}


def _meant(name: str, value: object, residual: TensorFile | None) -> torch.Tensor:
    """The update with what was left out of the last one, float32 on the CPU."""
    update = as_tensor(value)
    assert update is not None, "has a codec, so it is a tensor"
    meant = update.cpu().to(torch.float32)
    if residual is None or name not in residual:
        return meant
    carried = residual.read(name)
    return meant + carried if carried.shape == meant.shape else meant
