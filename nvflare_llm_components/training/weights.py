"""Weights in and out of the live model, under the names of the Hugging Face checkpoint."""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from nvflare_llm_components.training.conversion import Read, converted

StateDict = dict[str, torch.Tensor]
_SHOWN = 5


def snapshot(model: PreTrainedModel | PeftModel) -> StateDict:
    """A copy of what travels: contiguous CPU tensors that share no memory with the model.

    Full models have the names of their checkpoint, with tied weights once; adapters those of PEFT's
    ``save_pretrained``.
    """
    return {name: _copy(value) for name, value in _live(model).items()}


def load(model: PreTrainedModel | PeftModel, values: Mapping[str, Any]) -> str:
    """Write a global model into the live one, in place, so that optimizer and graph keep their references.

    Args:
        model: The model under training.
        values: Name to tensor, NumPy array, or lazy value (an object with ``materialize()``); any float
            dtype.

    Returns:
        A fingerprint of the values, equal for equal models.

    Raises:
        ValueError: Names are missing or surplus, a shape differs, or a value is not finite. The names are
            given, and checked before anything is written.
    """
    live = _live(model)
    _check_names(live.keys(), values.keys())
    print_of = _Fingerprint()
    if isinstance(model, PeftModel):
        # The setter drops what it does not know, so all is checked before it. Adapters are small.
        adapters = {name: _read(print_of, name, values[name], live[name].shape) for name in live}
        set_peft_model_state_dict(model, adapters)
        return print_of.text
    read = {name: partial(_read, print_of, name, values[name], live[name].shape) for name in live}
    _write(model, read, live)
    return print_of.text


class _Fingerprint:
    """Recognises a model by the sums of its tensors, in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, value: torch.Tensor) -> torch.Tensor:
        """Take ``value`` in, and return it."""
        self._digest.update(repr(value.sum(dtype=torch.float64).item()).encode())
        return value

    @property
    def text(self) -> str:
        return self._digest.hexdigest()


def difference(new: Mapping[str, torch.Tensor], received: Mapping[str, Any]) -> StateDict:
    """``new - received`` in float32, one tensor at a time; integer values are those of ``new``."""
    return {
        name: value.float() - as_tensor(received[name]).float() if value.is_floating_point() else value
        for name, value in new.items()
    }


def as_tensor(value: Any) -> torch.Tensor:
    """A tensor from a tensor, a NumPy array, or a lazy value."""
    if callable(getattr(value, "materialize", None)):
        value = value.materialize()
    return torch.as_tensor(value)


def _live(model: PreTrainedModel | PeftModel) -> StateDict:
    if isinstance(model, PeftModel):
        adapters: StateDict = get_peft_model_state_dict(model)
        return adapters
    state_dict = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = {name: value for name, value in state_dict.items() if name not in ignored}
    converted: StateDict = revert_weight_conversion(model, kept)
    return converted


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _read(print_of: "_Fingerprint", name: str, value: Any, shape: torch.Size) -> torch.Tensor:
    tensor = as_tensor(value)
    if tensor.shape != shape:
        raise ValueError(
            f"Global model: expected shape {tuple(shape)} for '{name}', found {tuple(tensor.shape)}. "
            "Give server and sites the same model."
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"Global model: expected finite values in '{name}', found NaN or infinity. "
            "A site's training diverged, or a lower precision overflowed."
        )
    return print_of.add(tensor)


def _write(model: PreTrainedModel, read: Mapping[str, Read], live: StateDict) -> None:
    """Straight into the parameters where the checkpoint's values are views of them; else converted."""
    parameters = model.state_dict()
    memory = {value.untyped_storage().data_ptr() for value in parameters.values()}
    with torch.no_grad():
        if all(value.untyped_storage().data_ptr() in memory for value in live.values()):
            for name, target in live.items():
                target.copy_(read[name]())
        else:
            for name, value in converted(model, read):
                parameters[name].copy_(value)


def _check_names(expected: Any, found: Any) -> None:
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        raise ValueError(
            f"Global model: expected the {len(expected)} names of this site's model, found "
            f"{len(missing)} missing{_some(missing)} and {len(surplus)} surplus{_some(surplus)}. "
            "Give server and sites the same model and peft_config."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f" ({shown}{', ...' if len(names) > _SHOWN else ''})" if names else ""
