"""Weights in and out of the live model, under the names of the Hugging Face checkpoint."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from nvflare_llm_components.tensors.adapters import adapter_tensors, load_adapter
from nvflare_llm_components.tensors.convert import tensor_of
from nvflare_llm_components.tensors.difference import Difference
from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.lazy import BLOCK_LENGTH, LazyValue
from nvflare_llm_components.tensors.names import aliases_of, checkpoint_tensors, normalised
from nvflare_llm_components.tensors.safetensors_file import Layout
from nvflare_llm_components.tensors.text import listed
from nvflare_llm_components.training.conversion import Read, converted
from nvflare_llm_components.training.sharded import assign, memory_of, whole

StateDict = dict[str, torch.Tensor]
Readable = Mapping[str, torch.Tensor | LazyValue]
"""Weights by name, some of which are made when they are read."""
_Spec = tuple[Sequence[int], torch.dtype]


def snapshot(model: PreTrainedModel | PeftModel) -> StateDict:
    """A copy of what travels: contiguous CPU tensors that share no memory with the model.

    Full models have the names of their checkpoint, with tied weights once; adapters those of PEFT's
    ``save_pretrained``.
    """
    return {name: _copy(value) for name, value in _live(model).items()}


def present(model: PreTrainedModel | PeftModel) -> dict[str, LazyValue]:
    """What :func:`snapshot` returns, each tensor copied when it is read, as it is then.

    Those that a checkpoint has in another form, such as a layer's experts one by one, are made at once.
    """
    return {name: _Present(value.detach()) for name, value in _live(model).items()}


def stream(model: PreTrainedModel | PeftModel, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """What :func:`snapshot` returns, in the order of ``layout``, one tensor at a time.

    Of a sharded model each process must take all of them; names, too, are found together.
    """
    live = _live(model)
    for name in layout:
        yield name, _copy(live.pop(name))


def further_names(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """Names of tied weights that :func:`snapshot` does not use, to the name that it does."""
    return {} if isinstance(model, PeftModel) else aliases_of(model)


def under_own_names(model: PreTrainedModel | PeftModel, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """``values`` with each tied weight once, under the name of :func:`snapshot`.

    Raises:
        CheckpointError: A tied weight comes under two names with two values.
    """
    return normalised(values, _live(model).keys(), further_names(model))


def load(model: PreTrainedModel | PeftModel, values: Mapping[str, Any]) -> str:
    """Write a global model into the live one, in place, so that optimizer and graph keep their references.

    Args:
        model: The model under training.
        values: Name to tensor, NumPy array, or lazy value (an object with ``materialize()``); any float
            dtype.

    Returns:
        A fingerprint of the values, equal for equal models.

    Raises:
        ValueError: Names are missing or surplus, a shape or kind of dtype differs, or a value is not finite.
            The names are given, and checked before anything is written.
    """
    live = _live(model)
    _check_names(live.keys(), values.keys())
    print_of = _Fingerprint()
    if isinstance(model, PeftModel):
        # The setter drops what it does not know, so all is checked before it. Adapters are small.
        adapters = {name: _read(print_of, name, values[name], _spec(live[name])) for name in live}
        load_adapter(model, adapters)
        return print_of.text
    read = {name: partial(_read, print_of, name, values[name], _spec(live[name])) for name in live}
    _write(model, read, live)
    return print_of.text


def layout_of(model: PreTrainedModel | PeftModel) -> Layout:
    """Shape and dtype of what :func:`snapshot` returns; wide dtypes first, as a file lays them out."""
    live = sorted(_live(model).items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    return {name: _spec(value) for name, value in live}


def checked(values: Mapping[str, Any], layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """A global model's values in the order and dtypes of ``layout``, one at a time.

    Raises:
        ValueError: As :func:`load`.
    """
    _check_names(layout.keys(), values.keys())
    for name, spec in layout.items():
        yield name, _read(_Fingerprint(), name, values[name], spec).to(spec[1])


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


def difference(new: Readable, received: Mapping[str, Any]) -> dict[str, torch.Tensor | LazyValue]:
    """What training changed, in float32 when it is read: ``new`` less ``received`` as the model held it.

    A bf16 model rounds what it is given; that is no change of this site's, and all sites would send it. Nor
    is there a change of integers: no optimizer touches them.
    """
    return {
        name: Difference(value, received[name])
        if value.is_floating_point()
        else torch.zeros(value.shape, dtype=value.dtype)
        for name, value in new.items()
    }


def _live(model: PreTrainedModel | PeftModel) -> StateDict:
    if isinstance(model, PeftModel):
        return adapter_tensors(model)
    tensors = checkpoint_tensors(model)
    trained = getattr(model, "trained_names", tensors.keys())
    return {name: value for name, value in tensors.items() if name in trained}


class _Present(LazyValue):
    """A tensor of a model that is parked: as long as it is, its blocks need no copy."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value

    def materialize(self) -> torch.Tensor:
        return _copy(self._value)

    def blocks(self) -> Iterator[torch.Tensor]:
        yield from self._flat().split(BLOCK_LENGTH)

    def reader(self) -> Callable[[slice], torch.Tensor]:
        flat = self._flat()
        return lambda part: flat[part]

    @property
    def shape(self) -> torch.Size:
        return self._value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._value.dtype

    def _flat(self) -> torch.Tensor:
        return whole(self._value).cpu().reshape(-1)


def _copy(value: torch.Tensor) -> torch.Tensor:
    return whole(value.detach()).to("cpu", copy=True).contiguous()


def _spec(value: torch.Tensor) -> _Spec:
    return tuple(value.shape), value.dtype


def _read(print_of: "_Fingerprint", name: str, value: Any, spec: _Spec) -> torch.Tensor:
    (shape, dtype), tensor = spec, tensor_of(value)
    if tensor.shape != torch.Size(shape):
        raise ReportableError(
            f"Global model: expected shape {tuple(shape)} for '{name}', found {tuple(tensor.shape)}. "
            "Give server and sites the same model."
        )
    if not dtype.is_floating_point:
        return print_of.add(_whole_numbers(name, tensor, dtype))
    if not tensor.is_floating_point():
        raise ReportableError(
            f"Global model: expected {dtype} or another float in '{name}', found {tensor.dtype}. "
            "Give server and sites the same model."
        )
    # Finite in 64 bits is not yet finite in the model.
    narrow = tensor.float() if tensor.dtype == torch.float64 else tensor
    if not bool(torch.isfinite(narrow).all()):
        raise ReportableError(
            f"Global model: expected finite values in '{name}', found NaN or infinity. "
            "A site's training diverged, or a lower precision overflowed."
        )
    return print_of.add(tensor)


def _whole_numbers(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is given for integers; their average comes as floats, which rounding has moved a little."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor
    whole = tensor.real.round()
    is_whole = torch.isclose(tensor.real, whole, rtol=1e-6, atol=1e-2) & torch.isfinite(tensor.real)
    if tensor.is_complex() or not bool(is_whole.all()):
        raise ReportableError(
            f"Global model: expected {dtype} or whole numbers in '{name}', found others of {tensor.dtype}. "
            "Give server and sites the same model and peft_config."
        )
    return whole


def _write(model: PreTrainedModel, read: Mapping[str, Read], live: StateDict) -> None:
    """Straight into the parameters where the checkpoint's values are views of them; else converted."""
    parameters = model.state_dict()
    memory = set(map(memory_of, parameters.values()))
    with torch.no_grad():
        if all(memory_of(value) in memory for value in live.values()):
            for name, target in live.items():
                assign(target, read[name]())
        else:
            for name, value in converted(model, read):
                assign(parameters[name], value)


def _check_names(expected: Any, found: Any) -> None:
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        raise ReportableError(
            f"Global model: expected the {len(expected)} names of this site's model, found "
            f"{len(missing)} missing{_some(missing)} and {len(surplus)} surplus{_some(surplus)}. "
            "Give server and sites the same model and peft_config."
        )


def _some(names: list[str]) -> str:
    return f" ({listed(names, 5)})" if names else ""
