"""What a model's configuration says about its checkpoint: names and shapes, without any weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.checkpoint.errors import CheckpointError


@dataclass(frozen=True)
class Expected:
    """Names and shapes of a model's checkpoint.

    Attributes:
        shapes: shape by name; a tied weight stands once.
        aliases: further names of tied weights, to the name that stands in `shapes`.
        prefix: what a checkpoint of the bare backbone lacks at the start of its names.
        ignored: regular expressions of names that old checkpoints hold and the model has no use for.
    """

    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    prefix: str
    ignored: list[str]


def expected_tensors(folder: Path) -> Expected:
    """Return what the configuration in a folder says of the model's tensors.

    Raises:
        CheckpointError: if there is no configuration of a causal language model.
    """
    model = meta_model(folder)
    kept: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in kept:
            aliases[name] = kept[id(parameter)]
        else:
            kept[id(parameter)] = name
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in aliases}
    return Expected(
        shapes=shapes,
        aliases=aliases,
        prefix=f"{model.base_model_prefix}.",
        ignored=list(model._keys_to_ignore_on_load_unexpected or []),
    )


def meta_model(folder: Path) -> Any:
    """Return the causal language model that a folder's configuration describes, on the meta device.

    Raises:
        CheckpointError: if there is no configuration of a causal language model.
    """
    # Imported here: a server that needs no check keeps a hundred megabytes.
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: expected the config.json of a causal language model that transformers knows, "
            f"found: {error}"
        ) from error


def checked(tensors: Mapping[str, torch.Tensor], expected: Expected, where: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors under the model's own names, each weight once, all of them checked.

    Args:
        tensors: values by the names in the files.
        expected: what the configuration says.
        where: the folder, for the error.

    Raises:
        CheckpointError: if tensors are missing, unknown or of another shape.
    """
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        own = name if name in expected.shapes or name in expected.aliases else expected.prefix + name
        if own in expected.aliases:
            found.setdefault(expected.aliases[own], value)
        elif own in expected.shapes:
            found[own] = value
        elif not any(re.search(pattern, name) for pattern in expected.ignored):
            found[name] = value
    complain(found, expected.shapes, f"{where}: the weights don't fit config.json beside them")
    return {name: found[name] for name in expected.shapes}


def complain(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise CheckpointError, naming up to three tensors, unless names and shapes are those expected."""
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    reshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
        if names
    ]
    if faults:
        raise CheckpointError(f"{what}: expected {len(shapes)} tensors, found {', '.join(faults)}.")
