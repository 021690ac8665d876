"""What a job starts from: a whole model, a fresh adapter, or an adapter made earlier."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.checkpoint.initial_adapter import initial_adapter
from nvflare_llm_components.checkpoint.locate import locate
from nvflare_llm_components.checkpoint.manifest import verify_files
from nvflare_llm_components.checkpoint.provenance import base_of
from nvflare_llm_components.checkpoint.validate import complain
from nvflare_llm_components.checkpoint.weight_files import ADAPTER_CONFIG, is_adapter, map_weights
from nvflare_llm_components.tensors.adapters import num_adapter_values
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.hub import only_for
from nvflare_llm_components.tensors.names import (
    ModelTensors,
    checkpoint_tensors,
    meta_model,
    model_tensors,
    under_own_names,
)
from nvflare_llm_components.tensors.trainable import trained_parameters

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
class InitialModel:
    """The model of round zero.

    Attributes:
        weights: tensors by checkpoint name; those that lie in a file are mapped from it.
        companions: contents of the files beside the weights, by file name: what becomes of the folder during
            the job changes nothing.
        aliases: further names of tied weights, to the name in `weights`.
        frozen: tensors that do not train: no message has them, a saved folder has.
        name: as the job calls it.
        folder: where it lies; for a fresh adapter, of its base.
    """

    weights: dict[str, torch.Tensor]
    companions: dict[str, bytes]
    aliases: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    name: str | None = None
    folder: Path | None = None

    def base(self) -> dict[str, Any]:
        """What a record says of where a federation began; reads all of the folder's weights."""
        try:
            return base_of(self.name, self.folder) if self.folder else {"name": self.name}
        except OSError:  # the folder is gone, and a model that was trained meanwhile must still be saved
            return {"name": self.name}


def load_initial_model(
    model_name_or_path: str | None,
    peft_config: dict[str, Any] | None,
    seed: int,
    trainable: Sequence[str] | None = None,
    allow: Callable[[int], object] = lambda num_values: None,
) -> InitialModel:
    """Return the model that a job starts from.

    Args:
        model_name_or_path: folder or hub name of a model, or of an adapter to go on with.
        peft_config: settings of a fresh adapter on that model; None trains all weights.
        seed: of a fresh adapter's values.
        trainable: patterns of the names that train, where not all do.
        allow: called with the number of values that travel, which it may refuse; with those of a fresh
            adapter before it is made, as its configuration tells them.

    Raises:
        CheckpointError: if the model or adapter can't be read, or doesn't fit its configuration.
    """
    folder = locate(model_name_or_path)
    verify_files(folder)
    if trainable is not None and (peft_config is not None or is_adapter(folder)):
        raise CheckpointError(
            "trainable: expected a whole model, found an adapter, which says what trains. Give one of them."
        )
    if peft_config is not None and not is_adapter(folder):
        allow(num_adapter_values(meta_model(folder), peft_config))
    model = _load(folder, str(model_name_or_path), peft_config, seed)
    if trainable is not None:
        model = _without_frozen(model, trained_parameters(meta_model(folder), trainable))
    allow(sum(value.numel() for value in model.weights.values()))
    return replace(model, name=model_name_or_path, folder=folder)


def _load(folder: Path, name: str, peft_config: dict[str, Any] | None, seed: int) -> InitialModel:
    tokenizer = _files(folder, TOKENIZER_FILES)
    if is_adapter(folder):
        _refuse_other_type(folder, peft_config)
        return InitialModel(map_weights(folder), {**tokenizer, **_files(folder, (ADAPTER_CONFIG,))})
    if peft_config is not None:
        weights, config = initial_adapter(folder, name, peft_config, seed)
        return InitialModel(weights, {**tokenizer, ADAPTER_CONFIG: config.encode()})
    expected = model_tensors(folder)
    weights = _weights(folder, expected)
    return InitialModel(weights, {**tokenizer, **_files(folder, MODEL_FILES)}, expected.aliases)


def _without_frozen(model: InitialModel, trained: Mapping[str, Sequence[str]]) -> InitialModel:
    names = {name for names in trained.values() for name in names}
    frozen = {name: value for name, value in model.weights.items() if name not in names}
    weights = {name: value for name, value in model.weights.items() if name in names}
    return replace(model, weights=weights, frozen=frozen)


def _weights(folder: Path, expected: ModelTensors) -> dict[str, torch.Tensor]:
    found = under_own_names(map_weights(folder), expected)
    if found.keys() != expected.shapes.keys():
        found = _converted(folder) or found
    complain(found, expected.shapes, f"{folder}: the weights don't fit config.json beside them")
    return {name: found[name] for name in expected.shapes}


def _converted(folder: Path) -> dict[str, torch.Tensor] | None:
    """The weights of a folder in an older or newer layout, as transformers reads it; None where it can't."""
    from transformers import AutoModelForCausalLM

    try:
        with only_for(str(folder.absolute())):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except (RuntimeError, ValueError):  # shapes that don't fit
        return None
    return None if any(report.values()) else checkpoint_tensors(model)


def _files(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in patterns for path in sorted(folder.glob(pattern))}


def _refuse_other_type(folder: Path, peft_config: dict[str, Any] | None) -> None:
    found = json.loads((folder / ADAPTER_CONFIG).read_text()).get("peft_type")
    if peft_config is not None and peft_config.get("peft_type", found) != found:
        raise CheckpointError(
            f"{folder}: expected an adapter of peft_type {peft_config['peft_type']}, as peft_config says, "
            f"found one of {found}. Give the adapter that was trained with these settings."
        )
