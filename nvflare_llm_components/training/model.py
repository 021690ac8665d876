"""Model and tokenizer from a Hugging Face folder or hub name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tensors.trainable import trained_parameters

# Said each time: where it is left open, transformers asks on standard input.
_NO_CODE = {"trust_remote_code": False}


def load_model(name_or_path: str, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """A causal language model with safetensors weights; float32 unless ``model_kwargs`` has a ``dtype``.

    Raises:
        ValueError: The model cannot be found or opened.
    """
    _check_folder(name_or_path)
    chosen = {"dtype": "float32", **model_kwargs, "use_safetensors": True, **_NO_CODE}
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **chosen)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ReportableError(
            f"model_name_or_path: '{name_or_path}' cannot be loaded: {printable(error, 300)}"
        ) from error
    config = model.config.get_text_config()
    if not hasattr(config, "num_experts") and hasattr(config, "num_local_experts"):
        config.num_experts = config.num_local_experts  # what TRL's load-balancing loss asks for
    return model


def freeze_all_but(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Train only the parameters whose names in the checkpoint match; only they travel.

    Raises:
        ValueError: A pattern cannot be used, or matches nothing.
    """
    trained = trained_parameters(model, patterns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model.trained_names = frozenset(name for names in trained.values() for name in names)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ValueError: It cannot be found, or it has no end-of-text token, so that answers would never end.
    """
    _check_folder(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **_NO_CODE)
    except (OSError, ValueError) as error:
        raise ReportableError(
            f"model_name_or_path: '{name_or_path}' has no usable tokenizer: {printable(error, 300)}"
        ) from error
    if tokenizer.eos_token is None:
        raise ReportableError(
            f"model_name_or_path: expected a tokenizer with an eos_token in '{name_or_path}', found none. "
            "Set eos_token in tokenizer_config.json."
        )
    return tokenizer


def _check_folder(name_or_path: str) -> None:
    path = Path(name_or_path)
    if path.is_absolute() and not path.is_dir():
        raise ReportableError(
            f"model_name_or_path: expected a Hugging Face folder, found nothing at '{name_or_path}'. "
            "Correct the path in the job, or copy the model to this site."
        )
