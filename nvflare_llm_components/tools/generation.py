"""Answers of a saved model, loaded with stock ``transformers`` and ``peft``."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvflare_llm_components.training.rows import ANSWER_CUE


def generate(saved: Path, base: str, prompts: Sequence[str], max_new_tokens: int = 24) -> list[str]:
    """Greedy answers of a saved model.

    Args:
        saved: a Hugging Face folder, or a PEFT folder.
        base: the base model's folder, for a PEFT folder.
        prompts: the ``input`` of rows.
        max_new_tokens: length of an answer at most, in tokens.

    Returns:
        One answer for each prompt.
    """
    is_adapter = (saved / "adapter_config.json").is_file()
    source = base if is_adapter else saved
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    model = PeftModel.from_pretrained(model, saved) if is_adapter else model
    model.eval()
    answers = []
    for prompt in prompts:
        encoded = tokenizer(prompt + ANSWER_CUE, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            tokens = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers
