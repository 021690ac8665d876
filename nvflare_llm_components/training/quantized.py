"""A base of 4 or 8 bits, over which an adapter trains: what it needs, said before the model is loaded."""

import importlib.util
from typing import Any

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.training.settings import TrainingSettings

_INSTALL = "pip install 'nvflare-llm-components[qlora]'"


def check_base(settings: TrainingSettings) -> None:
    """Check that this site can quantize the base as a job asks, and train over it.

    Raises:
        ReportableError: naming the setting, and for a missing package the command that installs it.
    """
    chosen = settings.model_kwargs.get("quantization_config")
    if not chosen:
        return
    num_kinds = sum(bool(chosen.get(key)) for key in ("load_in_4bit", "load_in_8bit"))
    if num_kinds != 1:
        raise ReportableError(
            "model_kwargs.quantization_config: expected one of load_in_4bit and load_in_8bit to be true, "
            f"found {num_kinds}. Change the job."
        )
    if settings.peft_config is None:
        raise ReportableError(
            "peft_config: expected an adapter over a quantized base, whose own weights can't be trained, "
            "found none. Add one to the job (LORA, say), or leave quantization_config out."
        )
    if settings.is_sharded:
        raise _not_sharded()
    if importlib.util.find_spec("bitsandbytes") is None:
        raise _not_installed()


def settle_base(model: Any, settings: TrainingSettings) -> None:
    """Keep a quantized base as it is over the whole job; its own files, too, may say that it is one.

    Raises:
        ReportableError: it would be sharded.
    """
    if not getattr(model, "is_quantized", False):
        return
    if settings.is_sharded:
        raise _not_sharded()
    for module in model.modules():
        # On such a CPU the first evaluation would pack the weights in place, and round their scales to
        # bf16: rounds after it would train over another base.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _not_sharded() -> ReportableError:
    return ReportableError(
        "sharding: expected 'none' for a quantized base, found 'full', which PEFT can't train. Change "
        "the job."
    )


def _not_installed() -> ReportableError:
    return ReportableError(
        "model_kwargs.quantization_config: expected the package bitsandbytes for a quantized base, found it "
        f"not installed at this site. Type: {_INSTALL}"
    )
