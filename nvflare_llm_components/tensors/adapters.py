"""What a kind of PEFT adapter needs, and what its tensors are called: one place for servers and sites."""

from collections.abc import Mapping
from typing import Any

import torch

from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.text import printable

_FROM_DATA = "its initial values come from data, which a server has not and each site has its own"
_HEAD = "needs logits, which TRL's trainer does not make: it goes from the last layer to the loss at once"
_UNFEDERATED: dict[tuple[str, str], str] = {
    ("init_lora_weights", "eva"): (
        f"{_FROM_DATA}. Make the adapter once with PEFT, give its folder to the server as "
        "model_name_or_path, and leave init_lora_weights out; or use 'orthogonal'"
    ),
    ("init_lora_weights", "corda"): f"{_FROM_DATA}. Use 'pissa' or 'olora', which look at the base alone",
    ("init_lora_weights", "lora_ga"): f"{_FROM_DATA}. Use 'pissa' or 'olora', which look at the base alone",
    ("init_lora_weights", "pissa_niter"): (
        "it splits the base by random numbers, so each site would have a base of its own. Use 'pissa'"
    ),
    ("init_lora_weights", "loftq"): (
        "it replaces the base by a quantized one that no saved folder holds. Quantize the base at the sites "
        "instead: model_kwargs.quantization_config, with LORA"
    ),
    ("peft_type", "ADALORA"): (
        "each site would prune other ranks by its own gradients, and the trainer never asks it to. Use LORA, "
        "with rank_pattern where modules need different ranks"
    ),
    ("peft_type", "MULTITASK_PROMPT_TUNING"): "it needs task ids, which the rows have not. Use PROMPT_TUNING",
    ("peft_type", "ADAPTION_PROMPT"): f"it {_HEAD}. Use PREFIX_TUNING",
    ("peft_type", "CPT"): f"it {_HEAD}. Use PROMPT_TUNING",
    ("peft_type", "POLY"): "it needs task ids, which the rows have not. Use LORA",
}
"""Settings by key and the start of their value, with the reason why no federation can work with them."""

_REMADE = ("save_projection", "save_precomputed_indices")
"""Whether to save large tensors that are never trained and that PEFT makes again from a seed."""


def adapter_config(peft_config: Mapping[str, Any]) -> Any:
    """Return PEFT's configuration of an adapter of a causal language model.

    Args:
        peft_config: a job's settings, with their `peft_type`.

    Raises:
        CheckpointError: if PEFT does not know or accept them, or no federation can work with them.
    """
    from peft import get_peft_config

    for (key, start), reason in _UNFEDERATED.items():
        value = peft_config.get(key)
        if isinstance(value, str) and value.startswith(start):
            raise CheckpointError(
                f"peft_config: {key} '{printable(value, 40)}' can't be federated: {reason}."
            )
    try:
        config = get_peft_config({"task_type": "CAUSAL_LM", **peft_config})
    except (KeyError, TypeError, ValueError, ImportError) as error:
        raise CheckpointError(
            "peft_config: expected settings of PEFT with a 'peft_type' (such as LORA), found "
            f"{printable(dict(peft_config), 300)}: {type(error).__name__}: {printable(error, 300)}"
        ) from error
    if "lm_head" in (getattr(config, "target_modules", None) or ()):
        raise CheckpointError(f"peft_config: target_modules 'lm_head' can't be federated: it {_HEAD}.")
    for key in _REMADE:
        if hasattr(config, key) and peft_config.get(key) is None:
            setattr(config, key, False)
    return config


def num_adapter_values(model: Any, peft_config: Mapping[str, Any]) -> int:
    """How many values an adapter will have, frozen ones included; nothing of it is made.

    Args:
        model: the base on the meta device, which is used up.
        peft_config: as of :func:`adapter_config`.

    Returns:
        The number; 0 where PEFT can't tell it (BOFT, FRoD, SHiRA and Uni-LoRA look at values), or refuses.

    Raises:
        CheckpointError: as :func:`adapter_config`.
    """
    from peft import get_peft_model

    config = adapter_config(peft_config)
    own = {id(value) for value in (*model.parameters(), *model.buffers())}
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, config)
    except Exception:  # told where the adapter is made
        return 0
    values = (*adapted.parameters(), *adapted.buffers())
    return sum(value.numel() for value in values if id(value) not in own)


def sft_settings(config: Any) -> dict[str, Any]:
    """What a kind needs of `trl.SFTConfig`: a prefix of keys is lost where activations are computed again."""
    is_prefix = config.peft_type in ("PREFIX_TUNING", "CARTRIDGE")
    return {"gradient_checkpointing": False} if is_prefix else {}


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """An adapter's tensors as PEFT's `save_pretrained` names them, without the base's embeddings."""
    from peft import get_peft_model_state_dict

    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def load_adapter(model: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter's tensors into a live model.

    Raises:
        CheckpointError: if the values in use are not those that were given.
    """
    from peft import set_peft_model_state_dict

    try:
        set_peft_model_state_dict(model, dict(values))
        unused = [name for name, used in adapter_tensors(model).items() if not _is_equal(used, values[name])]
    except RuntimeError:  # not even of the shape that is used
        unused = list(values)
    if unused:
        raise CheckpointError(
            f"{unused[0]}: for this kind of adapter PEFT does not use the values that it loads but others, "
            "computed from them (by an encoder, say, that no saved adapter has), so that no average of "
            "sites would be in use. Use PROMPT_TUNING, PREFIX_TUNING without prefix_projection, or LORA."
        )


def _is_equal(used: torch.Tensor, given: torch.Tensor) -> bool:
    whole: torch.Tensor = getattr(used, "full_tensor", lambda: used)()  # of a sharded one, in all processes
    return torch.equal(whole, given.to(whole.device, whole.dtype))
