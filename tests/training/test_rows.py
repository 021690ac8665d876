"""Rows of every kind, and what is said about rows that cannot be used."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from nvflare_llm_components.tensors.text import ANSWER_CUE
from nvflare_llm_components.training.build import build_trainer
from nvflare_llm_components.training.rows import load_rows
from nvflare_llm_components.training.settings import TrainingSettings
from tests.tiny import CHAT_TEMPLATE, save_tiny_model, write_rows

QUESTION = {"role": "user", "content": "1 + 1"}
ANSWER = {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input": "1 + 1", "output": "2"}, {"prompt": "1 + 1" + ANSWER_CUE, "completion": "2"}),
        ({"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "1 + 1 =", "completion": " 2"}),
        ({"text": "1 + 1 = 2", "id": 5}, {"text": "1 + 1 = 2"}),
        ({"messages": [QUESTION, ANSWER]}, {"prompt": [QUESTION], "completion": [ANSWER]}),
    ],
    ids=["input", "prompt", "text", "messages"],
)
def test_rows_of_every_kind(row, expected, tmp_path):
    assert load_rows(write_rows(tmp_path / "a.jsonl", [row, row]), "train_data").to_list() == [expected] * 2


@pytest.mark.parametrize("num_answers", [3, 500])
def test_a_long_conversation_is_a_row_an_answer(num_answers, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [QUESTION, ANSWER] * num_answers}])
    assert len(load_rows(path, "train_data")) == num_answers


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "assistant", "content": ""}] * 60_000},
        {"messages": [QUESTION, *[ANSWER] * 1000], "tools": [{"name": "a" * 1_000_000}]},
    ],
)
def test_a_conversation_that_would_take_all_memory_is_refused(row, tmp_path):
    """Two megabytes of answers alone took 54 GB as one row an answer."""
    path = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=r"row 1: expected conversations that take at most [\d,]+ bytes"):
        load_rows(path, "train_data")


def test_a_number_of_too_many_digits_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": ' + "1" * 5000 + "}\n")
    with pytest.raises(ValueError, match="a number of too many digits"):
        load_rows(tmp_path / "a.jsonl", "train_data")


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_other_formats(suffix, tmp_path):
    rows, path = [{"text": "a"}, {"text": "b"}], tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        Dataset.from_list(rows).to_parquet(path)
    assert load_rows(path, "train_data").to_list() == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["at least one row"]),
        ('{"question": "a"}\n', ["found 1 others", "input and output"]),
        ('{"text": "a"}\n{"input": "a"}\n', ["row 2", "'text'"]),
        ('{"text": "a"}\nnot json\n', ["row 2"]),
        ("[1]\n", ["row 1", "found list"]),
        ('{"messages": []}\n', ["row 1", "messages"]),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', ["row 1", "'assistant'", "'user'"]),
    ],
)
def test_unusable_rows_are_refused_by_place(text, words, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="eval_data") as caught:
        load_rows(path, "eval_data")
    assert all(word in str(caught.value) for word in [str(path), *words])


SYSTEM = {"role": "system", "content": "add"}
MORE = {"role": "user", "content": "2 + 2"}
LAST = {"role": "assistant", "content": "4"}


def test_every_answer_of_a_conversation_is_a_row(tmp_path):
    talk = [SYSTEM, QUESTION, ANSWER, MORE, LAST]
    found = load_rows(write_rows(tmp_path / "a.jsonl", [{"messages": talk}]), "train_data").to_list()
    assert found == [
        {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]},
        {"prompt": [SYSTEM, QUESTION, ANSWER, MORE], "completion": [LAST]},
    ]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_reach_the_template(as_text, tmp_path):
    template = "{% for tool in tools %}<{{ tool['name'] }}>{% endfor %}" + CHAT_TEMPLATE
    model = save_tiny_model(tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    tools = [{"name": "add"}, {"name": "sub", "parameters": {}}]
    row = {"messages": [QUESTION, ANSWER], "tools": json.dumps(tools) if as_text else tools}
    whole, learned = labels_of(model, row, tmp_path)
    assert whole == "<add><sub><|user|>1 + 1</s><|assistant|>2</s>"
    assert learned == "2</s>"


def test_calls_of_tools_are_refused_instead_of_left_out(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "secret"}}]}
    rows = write_rows(tmp_path / "a.jsonl", [{"messages": [QUESTION, call, ANSWER]}])
    with pytest.raises(ValueError, match="calls of tools in message 2, which are not trained"):
        load_rows(rows, "train_data")


def labels_of(model: Path, row: dict[str, object], folder: Path) -> tuple[str, str]:
    """The whole of a row as the model sees it, and the part that carries loss."""
    settings = TrainingSettings(
        model_name_or_path=str(model), train_data=write_rows(folder / "rows.jsonl", [row, row])
    )
    trainer = build_trainer(settings, folder)
    tokens, labels = (trainer.train_dataset[0][name] for name in ("input_ids", "labels"))
    decode = trainer.processing_class.decode
    return decode(tokens), decode([label for label in labels if label != -100])


@pytest.mark.parametrize(
    ("row", "whole", "learned"),
    [
        ({"input": "1 + 1", "output": "2"}, "1 + 1" + ANSWER_CUE + "2</s>", "2</s>"),
        ({"messages": [QUESTION, ANSWER]}, "<|user|>1 + 1</s><|assistant|>2</s>", "2</s>"),
        ({"text": "1 + 1"}, "1 + 1</s>", "1 + 1</s>"),
    ],
    ids=["input", "messages", "text"],
)
def test_only_the_answer_carries_loss(row, whole, learned, tmp_path):
    model = save_tiny_model(tmp_path / "model", chat_template=True)
    assert labels_of(model, row, tmp_path) == (whole, learned)


def test_messages_need_a_chat_template(model_folder, tmp_path):
    with pytest.raises(ValueError, match="chat template"):
        labels_of(model_folder, {"messages": [QUESTION, ANSWER]}, tmp_path)


def test_rows_that_max_length_cuts_away_are_refused(model_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"input": "long" * 20, "output": "2"}])
    settings = TrainingSettings(
        model_name_or_path=str(model_folder), train_data=rows, sft_config={"max_length": 16}
    )
    with pytest.raises(ValueError, match="train_data: expected answers within max_length=16"):
        build_trainer(settings, tmp_path)
