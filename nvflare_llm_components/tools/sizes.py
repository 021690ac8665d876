"""What one message and one round will cost, from a model's config alone.

The model is built on the meta device: shapes without memory. Payload sizes are exact to the byte.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nvflare.fuel.utils import fobs
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from nvflare_llm_components.quantization.checks import FORMAT_VERSION
from nvflare_llm_components.quantization.message import META_KEY
from nvflare_llm_components.quantization.precision import PRECISIONS, PrecisionPolicy
from nvflare_llm_components.quantization.wire import RAW, Entry, dtype_name
from nvflare_llm_components.tensors.adapters import adapter_config, adapter_tensors
from nvflare_llm_components.tensors.names import meta_model
from nvflare_llm_components.tensors.text import duration
from nvflare_llm_components.tools.timeouts import limits_of, seconds_of, verdicts


@dataclass(frozen=True)
class MessageSize:
    """One message between the server and a client.

    Attributes:
        label: precision, or what else the line is about.
        payload_bytes: bytes of all tensors.
        meta_bytes: bytes of what describes them, as NVFlare serializes it.
        num_params: tensors in the message.
    """

    label: str
    payload_bytes: int
    meta_bytes: int
    num_params: int

    @property
    def total_bytes(self) -> int:
        """Payload and meta."""
        return self.payload_bytes + self.meta_bytes

    def seconds_of_round(self, num_clients: int, mbps: float) -> float:
        """Seconds to send a message to each client and back; they share a link of `mbps` megabit/s."""
        return 2 * num_clients * self.total_bytes * 8 / (mbps * 1e6)


def meta_state_dict(model: str, peft: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a message on the meta device: all weights, tied ones once, or those of an adapter.

    Args:
        model: Hugging Face folder or hub name; only its config is read.
        peft: settings of an adapter as JSON text, or the path of a JSON file.

    Raises:
        CheckpointError: if there is no config at `model`, or it can't be built here, or no federation can
            work with the adapter.
        ValueError: if `peft` is no JSON object.
    """
    built = adapted(meta_model(model), peft)
    if peft is None:
        return {name: parameter.detach() for name, parameter in _tensors(built)}
    return adapter_tensors(built)


def adapted(model: Any, peft: str | None) -> Any:
    """A model of the meta device with an adapter on it, where there is one; see :func:`meta_state_dict`."""
    if peft is None:
        return model
    with torch.device("meta"):
        return get_peft_model(model, adapter_config(_peft_settings(peft)))


def message_size(state: Mapping[str, torch.Tensor], policy: PrecisionPolicy, label: str) -> MessageSize:
    """Size of a message of float32 weights of these shapes."""
    payload_bytes, entries = 0, {}
    for name, tensor in state.items():
        weights = tensor.float() if tensor.is_floating_point() else tensor
        size, entries[name] = _described(name, weights, policy)
        payload_bytes += size
    header = {"version": FORMAT_VERSION, "precision": policy.precision, "params": entries}
    return MessageSize(label, payload_bytes, len(fobs.dumps({META_KEY: header})), len(entries))


def stock_sizes(model: str) -> list[MessageSize]:
    """The same model as NVFlare's own quantizer sends it: every key of the state dict, tied weights twice."""
    num_bytes, state = {"fp32": 4, "fp16": 2}, meta_model(model).state_dict()
    num_weights = sum(tensor.numel() for tensor in state.values())
    return [
        MessageSize(f"stock {name}", size * num_weights, 0, len(state)) for name, size in num_bytes.items()
    ]


def show_sizes(
    model: str,
    precisions: Iterable[str] | None = None,
    peft: str | None = None,
    num_clients: int = 1,
    mbps: float = 1000.0,
    console: Console | None = None,
    rate: float | None = None,
    job: Path | None = None,
) -> None:
    """Print a table: bytes of a message and seconds of a round, by precision.

    Args:
        model: Hugging Face folder or hub name.
        precisions: which lines; None is all.
        peft: settings of an adapter as JSON text or the path of a JSON file.
        num_clients: clients that share the server's link.
        mbps: that link in megabit/s.
        console: where to print.
        rate: a site's own line in megabit/s; messages that take longer than the job's timeouts are named.
        job: whose timeouts; None for the shipped ones.
    """
    state = meta_state_dict(model, peft)
    sizes = [message_size(state, PrecisionPolicy(name), name) for name in precisions or PRECISIONS]
    full_bytes = sum(4 * tensor.numel() for tensor in state.values())
    table = Table(title=f"{model}: one message, and a round of {num_clients} clients at {mbps:g} Mbit/s")
    for column in ("precision", "payload bytes", "meta bytes", "of fp32", "seconds a round"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for size in [*sizes, *(stock_sizes(model) if peft is None else [])]:
        seconds = size.seconds_of_round(num_clients, mbps)
        ratio = size.total_bytes / full_bytes
        table.add_row(
            size.label, f"{size.payload_bytes:,}", f"{size.meta_bytes:,}", f"{ratio:.4f}", f"{seconds:,.1f}"
        )
    console = console or Console()
    console.print(table)
    for size in sizes if rate else ():
        told = verdicts(size.total_bytes, rate or 0.0, limits_of(job))
        seconds = seconds_of(size.total_bytes, rate or 0.0)
        told = told or [f"{duration(seconds)} one way at {rate:g} Mbit/s: within the timeouts."]
        for sentence in told:
            console.print(f"{size.label}: {sentence}", soft_wrap=True, highlight=False)


def _tensors(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Parameters, tied ones once, and the buffers that a checkpoint holds."""
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    return [*model.named_parameters(), *buffers]


def _described(name: str, weights: torch.Tensor, policy: PrecisionPolicy) -> tuple[int, Entry]:
    codec = policy.codec_of(name, weights)
    entry: Entry = {"dtype": dtype_name(weights.dtype), "shape": list(weights.shape), "crc32": 2**32 - 1}
    if codec is None:
        return weights.numel() * weights.element_size(), {"codec": RAW, **entry}
    block_size = codec.default_block_size and (policy.block_size or codec.default_block_size)
    entry |= {"codec": codec.name, "block_size": block_size, "num_nonfinite": 0}
    return codec.num_payload_bytes(weights.numel(), block_size, 0), entry


def _peft_settings(peft: str) -> dict[str, object]:
    text = peft if peft.lstrip().startswith("{") else Path(peft).read_text(encoding="utf-8")
    settings = json.loads(text)
    if not isinstance(settings, dict):
        raise ValueError(f"peft should be a JSON object. Found {type(settings).__name__}.")
    return settings
