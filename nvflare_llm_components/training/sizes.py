"""What a model takes, told by its configuration before anything of it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.tensors.names import meta_model

_QUANTIZED = {"load_in_4bit": 0.5, "load_in_8bit": 1.0}  # bytes of a weight of a linear layer


@dataclass(frozen=True)
class ModelSize:
    """What a model will have: weights, and bytes of them in memory."""

    num_weights: int
    num_bytes: int


def size_of(name_or_path: str, model_kwargs: Mapping[str, Any]) -> ModelSize:
    """Size of a model as :func:`.model.load_model` will load it.

    Args:
        name_or_path: absolute folder or hub name.
        model_kwargs: the executor's: ``dtype`` and ``quantization_config`` count.

    Raises:
        CheckpointError: it has no configuration that can be built here.
    """
    folder = Path(name_or_path)
    model = meta_model(folder if folder.is_absolute() else name_or_path)
    quantization = model_kwargs.get("quantization_config") or {}
    quantized = next((size for key, size in _QUANTIZED.items() if quantization.get(key)), None)
    inner = {} if quantized is None else dict.fromkeys(_inner_linear(model), quantized)
    itemsize = _dtype(model, model_kwargs).itemsize
    parameters = list(model.parameters())
    return ModelSize(
        num_weights=sum(parameter.numel() for parameter in parameters),
        num_bytes=int(
            sum(parameter.numel() * inner.get(id(parameter), itemsize) for parameter in parameters)
        ),
    )


def _inner_linear(model: Any) -> list[int]:
    """Weights that quantization takes: those of linear layers, but the last."""
    last = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not last)
    return [id(layer.weight) for layer in layers]


def _dtype(model: Any, model_kwargs: Mapping[str, Any]) -> torch.dtype:
    name = model_kwargs.get("dtype", "float32")
    chosen = model.config.dtype if name == "auto" else getattr(torch, name)
    return chosen if isinstance(chosen, torch.dtype) else torch.float32
