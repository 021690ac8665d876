"""Model, tokenizer and adapter configuration from a Hugging Face folder or hub name."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_config
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

_REFUSED = ("trust_remote_code", "state_dict", "use_safetensors")


def load_model(name_or_path: str, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """A causal language model with safetensors weights; float32 unless ``model_kwargs`` has a ``dtype``.

    Raises:
        ValueError: The model cannot be found or opened, or ``model_kwargs`` asks for what a job may not have.
    """
    for name in sorted(model_kwargs.keys() & set(_REFUSED)):
        raise ValueError(
            f"model_kwargs: expected no '{name}', found {model_kwargs[name]!r}: a job may not bring code."
        )
    _check_folder(name_or_path)
    chosen = {"dtype": "float32", **model_kwargs}
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, use_safetensors=True, **chosen)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"model_name_or_path: '{name_or_path}' cannot be loaded: {error}") from error


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ValueError: It cannot be found, or it has no end-of-text token, so that answers would never end.
    """
    _check_folder(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path: '{name_or_path}' has no usable tokenizer: {error}") from error
    if tokenizer.eos_token is None:
        raise ValueError(
            f"model_name_or_path: expected a tokenizer with an eos_token in '{name_or_path}', found none. "
            "Set eos_token in tokenizer_config.json."
        )
    return tokenizer


def load_peft_config(peft_config: dict[str, Any]) -> PeftConfig:
    """Adapter settings of any ``peft_type`` that PEFT knows.

    Raises:
        ValueError: ``peft_type`` is missing or unknown, or PEFT does not accept a value.
    """
    if "peft_type" not in peft_config:
        raise ValueError(
            f"peft_config: expected 'peft_type' (such as LORA), found {', '.join(peft_config) or 'nothing'}."
        )
    try:
        return get_peft_config({"task_type": "CAUSAL_LM", **peft_config})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"peft_config: PEFT does not accept it: {type(error).__name__}: {error}") from error


def _check_folder(name_or_path: str) -> None:
    path = Path(name_or_path)
    if path.is_absolute() and not path.is_dir():
        raise ValueError(
            f"model_name_or_path: expected a Hugging Face folder, found nothing at '{name_or_path}'. "
            "Correct the path in the job, or copy the model to this site."
        )
