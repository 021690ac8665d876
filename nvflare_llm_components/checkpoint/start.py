"""What a job starts from: a whole model, a fresh adapter, or an adapter made earlier."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.checkpoint.adapters import initial_adapter
from nvflare_llm_components.checkpoint.errors import CheckpointError
from nvflare_llm_components.checkpoint.expected import checked, expected_tensors
from nvflare_llm_components.checkpoint.folder import ADAPTER_CONFIG, is_adapter, map_weights
from nvflare_llm_components.checkpoint.record import verify_files
from nvflare_llm_components.checkpoint.source import locate

TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)
MODEL_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Start:
    """The model of round zero.

    Attributes:
        weights: tensors by checkpoint name; those that lie in a file are mapped from it.
        companions: what stands beside the weights in a folder: text, or a file to copy, by file name.
    """

    weights: dict[str, torch.Tensor]
    companions: dict[str, str | Path]


def start_from(model_name_or_path: str | None, peft_config: dict[str, Any] | None, seed: int) -> Start:
    """Return the model that a job starts from.

    Args:
        model_name_or_path: folder or hub name of a model, or of an adapter to go on with.
        peft_config: settings of a fresh adapter on that model; None trains all weights.
        seed: of a fresh adapter's values.

    Raises:
        CheckpointError: if the model or adapter can't be read, or doesn't fit its configuration.
    """
    folder = locate(model_name_or_path)
    verify_files(folder)
    tokenizer = _files(folder, TOKENIZER_FILES)
    if is_adapter(folder):
        _refuse_other_type(folder, peft_config)
        return Start(map_weights(folder), {**tokenizer, ADAPTER_CONFIG: folder / ADAPTER_CONFIG})
    if peft_config is not None:
        weights, config = initial_adapter(folder, str(model_name_or_path), peft_config, seed)
        return Start(weights, {**tokenizer, ADAPTER_CONFIG: config})
    weights = checked(map_weights(folder), expected_tensors(folder), folder)
    return Start(weights, {**tokenizer, **_files(folder, MODEL_FILES)})


def _files(folder: Path, patterns: tuple[str, ...]) -> dict[str, str | Path]:
    return {path.name: path for pattern in patterns for path in sorted(folder.glob(pattern))}


def _refuse_other_type(folder: Path, peft_config: dict[str, Any] | None) -> None:
    found = json.loads((folder / ADAPTER_CONFIG).read_text()).get("peft_type")
    if peft_config is not None and peft_config.get("peft_type", found) != found:
        raise CheckpointError(
            f"{folder}: expected an adapter of peft_type {peft_config['peft_type']}, as peft_config says, "
            f"found one of {found}. Give the adapter that was trained with these settings."
        )
