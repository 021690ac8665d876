"""What a model's tensors are called in its Hugging Face checkpoint, and how they are tied.

A model that lives on a site and one that a server knows by its configuration alone, on the meta device, go
through the same functions; so both sides agree on names and shapes, whatever the file was called in that a
model came from.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from nvflare_llm_components.tensors.convert import tensor_of
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.hub import only_for
from nvflare_llm_components.tensors.text import printable

T = TypeVar("T")
_BUFFER_BYTES = 2**29


@dataclass(frozen=True)
class ModelTensors:
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
    ignored: tuple[str, ...]


def model_tensors(folder: Path) -> ModelTensors:
    """Return what the configuration in a folder says of the model's tensors.

    Raises:
        CheckpointError: if there is no configuration of a causal language model.
    """
    model = meta_model(folder)
    return ModelTensors(
        shapes={name: tuple(value.shape) for name, value in checkpoint_tensors(model).items()},
        aliases=aliases_of(model),
        prefix=f"{model.base_model_prefix}.",
        ignored=_ignored(model),
    )


def meta_model(name_or_path: str | Path) -> Any:
    """Return the causal language model that a configuration describes, on the meta device.

    Args:
        name_or_path: a folder with a config.json, or a hub name. For a folder nothing is fetched.

    Raises:
        CheckpointError: if there is no configuration of a causal language model, or what it asks for is not
            installed here.
    """
    # Imported here: a server that needs no check keeps a hundred megabytes.
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(name_or_path)
    place = str(folder.absolute()) if isinstance(name_or_path, Path) or folder.exists() else name_or_path
    try:
        with only_for(place), torch.device("meta"):
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            # Attention has no say in names and shapes, and its package need not be here.
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{place}: expected the config.json of a causal language model that transformers knows, "
            f"found: {_first_line(error)}"
        ) from error
    except ImportError as error:
        raise CheckpointError(
            f"{place}: expected a config.json whose model can be built here, found that it asks for what is "
            f"not installed: {_first_line(error)}"
        ) from error
    _check_buffers(place, model)
    return model


def _check_buffers(place: str, model: Any) -> None:
    """Old models make a square mask of their positions in each layer, which no file holds."""
    buffers = sum(value.nbytes for value in model.buffers())
    weights = sum(value.nbytes for value in model.parameters())
    if buffers > _BUFFER_BYTES + weights:
        raise CheckpointError(
            f"{place}: config.json: expected masks and tables of at most {_BUFFER_BYTES + weights:,} bytes, "
            f"found {buffers:,}. Lower the number of positions."
        )


def _first_line(error: Exception) -> str:
    return printable(next(iter(str(error).splitlines()), type(error).__name__))


def checkpoint_tensors(model: Any) -> dict[str, torch.Tensor]:
    """A transformers model's tensors as its `save_pretrained` writes them: names, shapes, a tied weight once.

    Values are the model's own memory, save where the model stores them otherwise (as stacked experts, say).
    """
    kept = _kept(model)
    return _renamed(model, {name: value for name, value in model.state_dict().items() if name in kept})


def aliases_of(model: Any) -> dict[str, str]:
    """Further names of a transformers model's tied weights, to the name in `checkpoint_tensors`."""
    owners = {id(model.get_parameter_or_buffer(name)): name for name in _kept(model)}
    found = {}
    for name in model.state_dict():
        owner = owners.get(id(model.get_parameter_or_buffer(name)), name)
        if owner != name:
            found[checkpoint_names(model, name)[0]] = checkpoint_names(model, owner)[0]
    return found


def checkpoint_names(model: Any, name: str) -> list[str]:
    """What a checkpoint calls a tensor of a model's state dict; several names where it holds it in pieces."""
    return list(_renamed(model, {name: model.get_parameter_or_buffer(name)}))


def conversions_of(model: Any) -> list[Any]:
    """The steps of transformers from a checkpoint to this class of model, whatever a file needed."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    steps = get_model_conversion_mapping(model, add_legacy=False)
    # One that removes a prefix would add it, in reverse, to models whose files never had it.
    return [step for step in steps if not isinstance(step, PrefixChange)]


def normalised(values: Mapping[str, T], names: Collection[str], aliases: Mapping[str, str]) -> dict[str, T]:
    """Return a state dict with each tied weight once, under the name that the checkpoint has.

    Args:
        values: tensors, arrays or lazy values by name.
        names: those of the checkpoint.
        aliases: further names of tied weights, to the name in `names`.

    Raises:
        CheckpointError: if a tied weight comes under two names with two values.
    """
    found = {name: value for name, value in values.items() if name in names or name not in aliases}
    for alias in aliases.keys() & values.keys() - names:
        name = aliases[alias]
        if name in found and not torch.equal(tensor_of(found[name]), tensor_of(values[alias])):
            raise CheckpointError(
                f"{printable(alias)}: expected the values of {name}, to which the model's configuration ties "
                "it, found others. Send or save one of them; where they are two weights, set "
                "tie_word_embeddings to false in config.json, on server and sites."
            )
        found.setdefault(name, values[alias])
    return found


def under_own_names(values: Mapping[str, T], expected: ModelTensors) -> dict[str, T]:
    """Return the tensors of a checkpoint's files under the model's own names, each weight once.

    Names that only lack the backbone's prefix get it; names that old files hold and no model uses are left
    out; all others stay, for the caller to refuse.

    Raises:
        CheckpointError: if a tied weight comes under two names with two values.
    """
    known = expected.shapes.keys() | expected.aliases.keys()
    own = {name if name in known else _with_prefix(name, known, expected): name for name in values}
    found = {name: values[given] for name, given in own.items() if name is not None}
    return normalised(found, expected.shapes.keys(), expected.aliases)


def _with_prefix(name: str, known: Collection[str], expected: ModelTensors) -> str | None:
    if expected.prefix + name in known:
        return expected.prefix + name
    return None if any(re.search(pattern, name) for pattern in expected.ignored) else name


def _kept(model: Any) -> set[str]:
    """The names of a model's state dict that a checkpoint holds."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    kept: dict[str, torch.Tensor] = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    return kept.keys() - set(model._keys_to_ignore_on_save or ())


def _renamed(model: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    with _without_a_files_conversions(model):
        converted: dict[str, torch.Tensor] = revert_weight_conversion(model, values)
    return converted


@contextmanager
def _without_a_files_conversions(model: Any) -> Iterator[None]:
    """Let transformers take the conversions of the model's class, not those that its file needed."""
    needed = getattr(model, "_weight_conversions", None)
    model._weight_conversions = None
    try:
        yield
    finally:
        model._weight_conversions = needed


def _ignored(model: Any) -> tuple[str, ...]:
    """What transformers drops without a word when it loads a model of this class."""
    buffers = [name for name, _ in model.named_buffers()]
    moved = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
    dropped = [pattern for end, pattern in moved.items() if any(name.endswith(end) for name in buffers)]
    unused = [re.escape(name) for name in model._keys_to_ignore_on_save or ()]
    return (*(model._keys_to_ignore_on_load_unexpected or ()), *dropped, *unused)
