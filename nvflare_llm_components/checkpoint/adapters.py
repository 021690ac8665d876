"""The initial tensors of a PEFT adapter, made by PEFT itself from the base model's configuration alone."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.checkpoint.errors import CheckpointError
from nvflare_llm_components.checkpoint.expected import meta_model
from nvflare_llm_components.checkpoint.folder import ADAPTER_CONFIG


def initial_adapter(
    base: Path, base_name: str, peft_config: dict[str, Any], seed: int
) -> tuple[dict[str, torch.Tensor], str]:
    """Return a fresh adapter: the same seed gives the same tensors, on every site.

    Args:
        base: folder with the base model's configuration; its weights are not read.
        base_name: what the adapter's configuration calls the base model.
        peft_config: for `peft.get_peft_config`, with its `peft_type`.
        seed: of PEFT's initialisation.

    Returns:
        Float32 tensors by the names that PEFT's `save_pretrained` writes, and adapter_config.json's text.

    Raises:
        CheckpointError: if PEFT refuses the configuration or it fits no module, or if the initial values
            depend on the base model's weights (PiSSA, DoRA, `modules_to_save` and the like).
    """
    from peft import get_peft_model_state_dict

    model = _adapted(base, base_name, peft_config, seed)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: value.detach().clone().contiguous() for name, value in state.items()}
    unknown = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if unknown:
        raise CheckpointError(_needs_base(unknown[0], base))
    return tensors, _config_text(model.peft_config["default"])


def _adapted(base: Path, base_name: str, peft_config: dict[str, Any], seed: int) -> Any:
    from peft import get_peft_config, get_peft_model

    try:
        config = get_peft_config(dict(peft_config))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(_hollow(meta_model(base)), config)
    except RuntimeError as error:  # of linear algebra on NaN
        raise CheckpointError(_needs_base(f"peft_config {peft_config}", base)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"peft_config: expected settings of PEFT that fit a module of {base_name}, "
            f"found {peft_config}: {error}"
        ) from error
    # PEFT takes the name from the model, which knows none: it was built from a configuration.
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


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


def _needs_base(what: str, base: Path) -> str:
    return (
        f"{what}: its initial value depends on the base model's weights, which the server does not load "
        f"({base}). Make the adapter once with PEFT, `save_pretrained` it, "
        "and give that folder as model_name_or_path."
    )
