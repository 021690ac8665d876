from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nvflare_llm_components.tools.generation import generate, judge, merge
from nvflare_llm_components.training.evaluate import evaluate_model
from tests.tiny import save_tiny_model, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), chat_template=True)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def test_a_merged_model_answers_as_adapter_and_base_do(base: Path, adapter: Path, tmp_path: Path):
    merged = merge(adapter, tmp_path / "merged", str(base))
    prompts = ["2 + 2?", "Where is Rome?"]
    of_adapter, of_merged = generate(adapter, str(base), prompts), generate(merged, None, prompts)
    assert of_adapter == of_merged
    assert of_adapter != generate(base, None, prompts)


def test_an_adapter_names_its_base(base: Path, adapter: Path):
    assert generate(adapter, None, ["?"]) == generate(adapter, str(base), ["?"])


def test_chat_frames_the_prompt_as_the_template_does(base: Path):
    (framed,) = generate(base, None, ["hi"], chat=True)
    (turns,) = generate(base, None, [[{"role": "user", "content": "hi"}]], chat=True)
    assert framed == turns
    assert framed != generate(base, None, ["hi"])[0]


def test_what_cannot_be_done_is_said(base: Path, adapter: Path, tmp_path: Path):
    plain = save_tiny_model(tmp_path / "plain")
    with pytest.raises(ValueError, match="expected a chat template"):
        generate(plain, None, ["?"], chat=True)
    with pytest.raises(ValueError, match=r"Found no config\.json"):
        generate(tmp_path, None, ["?"])
    with pytest.raises(ValueError, match="expected a PEFT folder"):
        merge(base, tmp_path / "out")
    with pytest.raises(FileExistsError, match="expected no such folder"):
        merge(adapter, tmp_path)


def test_judging_tells_the_loss_of_all_rows_and_the_exact_matches(base: Path, tmp_path: Path):
    (answer,) = generate(base, None, ["2 + 2?"], 8)
    (chat,) = generate(base, None, ["hi"], 8, chat=True)
    rows: list[dict[str, object]] = [
        {"input": "2 + 2?", "output": answer.strip() or "x"},
        {"input": "2 + 2?", "output": "no model says this"},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = judge(base, file, max_new_tokens=8)
    assert (found.num_exact, found.num_asked) == (int(bool(answer.strip())), 2)
    expected = evaluate_model(model_folder=base, eval_data=file, sft_config={"disable_tqdm": True})
    assert found.loss == pytest.approx(expected["eval_loss"])
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": chat}]
    of_chat = judge(base, write_rows(tmp_path / "chat.jsonl", [{"messages": turns}]), max_new_tokens=8)
    assert (of_chat.num_exact, of_chat.num_asked) == (1, 1)
