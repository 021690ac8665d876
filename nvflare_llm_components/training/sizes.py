"""What a model takes, told by its configuration before anything of it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.tensors.adapters import num_adapter_values
from nvflare_llm_components.tensors.names import meta_model

_QUANTIZED = {"load_in_4bit": 0.5, "load_in_8bit": 1.0}  # bytes of a weight of a linear layer


@dataclass(frozen=True)
class ModelSize:
    """What a model will have: weights of its own, and bytes of all in memory."""

    num_weights: int
    num_bytes: int


def size_of(
    name_or_path: str, model_kwargs: Mapping[str, Any], peft_config: Mapping[str, Any] | None = None
) -> ModelSize:
    """Size of a model as :func:`.model.load_model` will load it, with the bytes of an adapter on it.

    Args:
        name_or_path: absolute folder or hub name.
        model_kwargs: the executor's: ``dtype`` and ``quantization_config`` count.
        peft_config: of the adapter, whose values are in float32; None for none.

    Raises:
        CheckpointError: it has no configuration that can be built here, or no federation can work with the
            adapter.
    """
    folder = Path(name_or_path)
    model = meta_model(folder if folder.is_absolute() else name_or_path)
    quantization = model_kwargs.get("quantization_config") or {}
    quantized = next((size for key, size in _QUANTIZED.items() if quantization.get(key)), None)
    inner = {} if quantized is None else dict.fromkeys(_inner_linear(model), quantized)
    itemsize = _dtype(model, model_kwargs).itemsize
    sizes = {parameter: inner.get(id(parameter), itemsize) for parameter in model.parameters()}
    num_bytes = int(sum(parameter.numel() * size for parameter, size in sizes.items()))
    num_weights = sum(parameter.numel() for parameter in sizes)
    if peft_config:
        num_bytes += 4 * num_adapter_values(model, peft_config)
    return ModelSize(num_weights, num_bytes)


def _inner_linear(model: Any) -> list[int]:
    """Weights that quantization takes: those of linear layers, but the last."""
    last = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not last)
    return [id(layer.weight) for layer in layers]


def _dtype(model: Any, model_kwargs: Mapping[str, Any]) -> torch.dtype:
    name = model_kwargs.get("dtype", "float32")
    chosen = model.config.dtype if name == "auto" else getattr(torch, name)
    return chosen if isinstance(chosen, torch.dtype) else torch.float32
