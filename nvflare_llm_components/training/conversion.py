"""Checkpoint values into models that store them otherwise, such as stacked experts."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from nvflare_llm_components.tensors.names import conversions_of

Read = Callable[[], torch.Tensor]


def converted(model: PreTrainedModel, values: Mapping[str, Read]) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert as ``from_pretrained`` does, one parameter of the model at a time.

    Args:
        model: The model that the values are for.
        values: Checkpoint name to a function that gives the value; each is called once.

    Yields:
        Parameter name and value.
    """
    for target, transform in _transforms(model, values).items():
        found = transform.convert(target, model=model, config=model.config)
        for name, value in found.items():
            yield name, value[0] if isinstance(value, list) else value


def _transforms(model: PreTrainedModel, values: Mapping[str, Read]) -> dict[str, WeightTransform]:
    conversions = conversions_of(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, WeightTransform] = {}
    for name in sorted(values, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        if pattern is None:
            transform = found.setdefault(target, WeightRenaming(name, target))
            transform.add_tensor(target, name, name, values[name])
        else:
            transform = found.setdefault(target, deepcopy(by_pattern[pattern]))
            transform.add_tensor(target, name, pattern, values[name])
    return found
