"""What people do with a trained model: ask it, merge an adapter into its base, judge it on held-out rows.

Stock ``transformers`` and ``peft`` alone: whoever has the saved folder can do the same without this package.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvflare_llm_components.data.records import Record, read_records
from nvflare_llm_components.tensors.text import ANSWER_CUE
from nvflare_llm_components.training.evaluate import evaluate_model

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Judged:
    """How a model does on held-out rows.

    Attributes:
        loss: mean cross entropy of the answers' tokens, as in training.
        perplexity: its exponential.
        num_exact: rows whose greedy answer is the expected one, white space at the ends aside.
        num_asked: rows that were asked.
    """

    loss: float
    perplexity: float
    num_exact: int
    num_asked: int


def generate(
    saved: Path,
    base: str | None,
    prompts: Sequence[str | list[Record]],
    max_new_tokens: int = 24,
    chat: bool = False,
) -> list[str]:
    """Greedy answers of a saved model.

    Args:
        saved: a Hugging Face folder, or a PEFT folder.
        base: the base model of a PEFT folder; None is the one that the folder names.
        prompts: the ``input`` of rows, or with `chat` what a user says, or the messages so far.
        max_new_tokens: length of an answer at most, in tokens.
        chat: whether the model's chat template frames a prompt; otherwise it is framed as in training on
            rows of ``{"input", "output"}``.

    Returns:
        One answer for each prompt.

    Raises:
        ValueError: there is no model, or it has no chat template.
    """
    model, tokenizer = opened(saved, base)
    if chat and not tokenizer.chat_template:
        raise ValueError(f"{saved}: expected a chat template. Found none. Leave --chat out.")
    framed = [_chat(tokenizer, prompt) if chat else f"{prompt}{ANSWER_CUE}" for prompt in prompts]
    return [_answer(model, tokenizer, prompt, max_new_tokens, chat) for prompt in framed]


def merge(adapter: Path, out: Path, base: str | None = None) -> Path:
    """Writes a full model out of an adapter and its base, with the tokenizer.

    Args:
        adapter: a PEFT folder.
        out: the folder to write; it must not exist.
        base: the base model; None is the one that the adapter names.

    Raises:
        FileExistsError: `out` exists.
        ValueError: `adapter` is no PEFT folder, or its kind of adapter can't be merged.
    """
    if out.exists():
        raise FileExistsError(f"{out}: expected no such folder yet. Choose another --out.")
    if not (adapter / _ADAPTER).is_file():
        raise ValueError(f"{adapter}: expected a PEFT folder with {_ADAPTER}. Found none.")
    model, tokenizer = opened(adapter, base)
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"{adapter}: expected an adapter that can be merged, such as LoRA. Found another.")
    model.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def judge(
    saved: Path,
    rows: Path,
    base: str | None = None,
    max_rows: int = 100,
    max_new_tokens: int = 64,
) -> Judged:
    """Loss of a saved model on all rows of a file, and exact match on its first ones.

    Args:
        saved: a Hugging Face folder, or a PEFT folder.
        rows: rows as a site has them.
        base: the base model of a PEFT folder; None is the one that the folder names.
        max_rows: rows that are asked; 0 for the loss alone.
        max_new_tokens: length of an answer at most, in tokens.

    Raises:
        ValueError: the rows or the model can't be used.
        OSError: a file is missing.
    """
    is_adapter = (saved / _ADAPTER).is_file()
    loss = evaluate_model(
        model_folder=saved,
        eval_data=rows,
        base_model=_base_of(saved, base) if is_adapter else None,
        sft_config={"disable_tqdm": True},
    )
    questions = [found for row in read_records(rows)[:max_rows] if (found := _question(row))]
    num_exact = 0
    for chat in (False, True):
        asked = [(prompt, answer) for prompt, answer in questions if isinstance(prompt, list) == chat]
        prompts = [prompt for prompt, _ in asked]
        answers = generate(saved, base, prompts, max_new_tokens, chat) if asked else []
        num_exact += sum(
            answer.strip() == expected.strip() for answer, (_, expected) in zip(answers, asked, strict=True)
        )
    return Judged(loss["eval_loss"], loss["eval_perplexity"], num_exact, len(questions))


def opened(saved: Path, base: str | None) -> tuple[Any, Any]:
    """Model and tokenizer of a saved folder.

    Args:
        saved: a Hugging Face folder, or a PEFT folder.
        base: the base model of a PEFT folder; None is the one that the folder names.

    Raises:
        ValueError: there is no model.
    """
    is_adapter = (saved / _ADAPTER).is_file()
    if not is_adapter and not (saved / "config.json").is_file():
        raise ValueError(f"{saved}: expected a Hugging Face or PEFT folder. Found no config.json.")
    source = _base_of(saved, base) if is_adapter else str(saved)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    model = PeftModel.from_pretrained(model, saved) if is_adapter else model
    return model.eval(), tokenizer


def _question(row: Record) -> tuple[str | list[Record], str] | None:
    """What to ask, text or messages, and the expected answer; None for a row of plain text."""
    if "input" in row and "output" in row:
        return row["input"], row["output"]
    messages = row.get("messages")
    if isinstance(messages, list) and len(messages) > 1:
        return messages[:-1], messages[-1]["content"]
    return None


def _base_of(saved: Path, base: str | None) -> str:
    named = base or json.loads((saved / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{saved}: expected to know the adapter's base. Give it with --base.")
    return str(named)


def _chat(tokenizer: Any, prompt: str | list[Record]) -> str:
    """A prompt in the model's chat template."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    framed: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return framed


def _answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, chat: bool) -> str:
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not chat)
    with torch.inference_mode():
        tokens = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False)
    answer: str = tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer
