"""The initial tensors of a PEFT adapter, made by PEFT from the base model's configuration where it can."""

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.checkpoint.weight_files import ADAPTER_CONFIG
from nvflare_llm_components.tensors.adapters import adapter_config, adapter_tensors, load_adapter
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.names import meta_model


def initial_adapter(
    base: Path, base_name: str, peft_config: dict[str, Any], seed: int
) -> tuple[dict[str, torch.Tensor], str]:
    """Return a fresh adapter: the same seed gives the same tensors, on every machine.

    The base model's weights are read only where initial values depend on them (DoRA, PiSSA,
    `modules_to_save` and the like), and are let go of again.

    Args:
        base: folder of the base model.
        base_name: what the adapter's configuration calls the base model.
        peft_config: for `peft.get_peft_config`, with its `peft_type`.
        seed: of PEFT's initialisation.

    Returns:
        Float32 tensors by the names that PEFT's `save_pretrained` writes, and adapter_config.json's text.

    Raises:
        CheckpointError: if PEFT refuses the configuration or it fits no module, or if its tensors can't be
            averaged.
    """
    config = adapter_config(peft_config)
    try:
        model = _adapted(_hollow(meta_model(base)), base_name, config, seed)
    except _ComputedError:
        model = None
    if model is None or not all(_is_independent(value) for value in adapter_tensors(model).values()):
        del model
        gc.collect()
        model = _adapted(_loaded(base), base_name, adapter_config(peft_config), seed)
    tensors = {name: value.detach().clone().contiguous() for name, value in adapter_tensors(model).items()}
    load_adapter(model, {name: _changed(value) for name, value in tensors.items()})
    return tensors, _config_text(model.peft_config["default"])


class _ComputedError(CheckpointError):
    """An adapter's initial values could not be computed without the base's weights."""


def _adapted(model: Any, base_name: str, config: Any, seed: int) -> Any:
    from peft import get_peft_model

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except RuntimeError as error:  # such as linear algebra on NaN
        raise _ComputedError(f"peft_config: PEFT can't adapt {base_name} so: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
        raise CheckpointError(
            f"peft_config: expected settings of PEFT that fit a module of {base_name}, "
            f"found {config.to_dict()}: {error}"
        ) from error
    # PEFT takes the name from the model, which may know none: it was built from a configuration.
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def _is_independent(value: torch.Tensor) -> bool:
    """Whether an initial value can't come from the base: its weights are NaN, as is what follows from them.

    Integers don't show it: they may be drawn, or an order of the base's values.
    """
    return value.is_floating_point() and bool(torch.isfinite(value).all())


def _changed(value: torch.Tensor) -> torch.Tensor:
    return value + 0.5 if value.is_floating_point() else value


def _loaded(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{base}: this kind of adapter starts from values of the base model, which can't be read: {error}"
        ) from error


def _hollow(model: Any) -> Any:
    """Give every weight of a meta model a CPU tensor of its shape that is one NaN, stretched.

    PEFT creates an adapter on its base's device, so that device must be a real one; and whatever is computed
    from base weights that are not there is NaN, and shows.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.full((), torch.nan, dtype=parameter.dtype, device="cpu").expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return model


def _config_text(config: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        settings = json.loads(Path(folder, ADAPTER_CONFIG).read_text())
    # PEFT keeps module names in sets, whose order differs from process to process.
    ordered = {
        key: sorted(value)
        if isinstance(value, list) and all(isinstance(item, str) for item in value)
        else value
        for key, value in settings.items()
    }
    return json.dumps({**ordered, "inference_mode": True}, indent=2, sort_keys=True) + "\n"
