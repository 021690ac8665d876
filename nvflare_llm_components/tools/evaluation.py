"""Loss and answers of a saved global model, in the program of the person who looks at it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvflare_llm_components.training.rows import ANSWER_CUE
from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.settings import TrainingSettings

_ADAPTER = "adapter_model.safetensors"


def evaluate(saved: Path, settings: TrainingSettings) -> float:
    """Eval loss of a saved model, computed as a site computes it.

    Args:
        saved: a Hugging Face folder, or a PEFT folder where ``settings`` has a ``peft_config``.
        settings: the site's; ``eval_data`` is needed.

    Returns:
        Mean loss of an answer's token.
    """
    adapter = saved / _ADAPTER
    if settings.peft_config is None:
        settings = replace(settings, model_name_or_path=str(saved))
    with TemporaryDirectory() as folder:
        session = SFTSession(settings, Path(folder))
        try:
            if settings.peft_config is not None:
                session.load(load_file(adapter))
            return session.evaluate()["eval_loss"]
        finally:
            session.close()


def generate(saved: Path, base: str, prompts: Sequence[str], max_new_tokens: int = 24) -> list[str]:
    """Greedy answers of a saved model, loaded with stock ``transformers`` and ``peft``.

    Args:
        saved: a Hugging Face folder, or a PEFT folder.
        base: the base model's folder, for a PEFT folder.
        prompts: the ``input`` of rows.
        max_new_tokens: length of an answer at most, in tokens.

    Returns:
        One answer for each prompt.
    """
    is_adapter = (saved / _ADAPTER).is_file()
    tokenizer = AutoTokenizer.from_pretrained(base if is_adapter else saved)
    model = AutoModelForCausalLM.from_pretrained(base if is_adapter else saved)
    model = PeftModel.from_pretrained(model, saved) if is_adapter else model
    model.eval()
    answers = []
    for prompt in prompts:
        encoded = tokenizer(prompt + ANSWER_CUE, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            tokens = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers
