import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.data.own_rows import Columns, as_chat, own_rows
from nvflare_llm_components.data.prepare import prepare
from nvflare_llm_components.data.records import read_records


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_named_columns_are_read_and_others_left_out(tmp_path):
    file = write(tmp_path / "a.jsonl", {"q": " 2 + 2? ", "a": 4, "about": "sums", "id": 7})
    rows, num_skipped = own_rows([file], Columns("q", "a", "about", ("id",)))
    assert rows == [{"input": "2 + 2?\n\nsums", "output": "4", "id": 7}]
    assert num_skipped == 0


def test_a_spreadsheets_csv_is_read_with_its_quotes_and_its_mark(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(
        '\ufeffq,a\r\n"Say ""yes"", please","one\nline, and one"\r\n', encoding="utf-8", newline=""
    )
    rows, _ = own_rows([file], Columns("q", "a"))
    assert rows == [{"input": 'Say "yes", please', "output": "one\nline, and one"}]


@pytest.mark.parametrize(
    "row",
    [
        {"input": "q", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_known_columns_need_no_names(tmp_path, row):
    rows, _ = own_rows([write(tmp_path / "a.jsonl", row)], Columns())
    expected = row if "messages" in row else {"input": "q", "output": "a"}
    assert rows == [expected]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"q": "?", "a": "!"}], Columns(), "Found q, a. Say which hold question and answer"),
        ([{"q": "?", "a": "!"}], Columns("q"), "expected both. Found one"),
        ([{"q": "?", "a": "!"}], Columns("q", "b"), "row 1: expected the columns q, b. Found q, a"),
        ([{"q": "?", "a": "!"}, {"q": "?"}], Columns("q", "a"), "row 2: .* so a is missing"),
        ([{"q": "?", "a": "!"}], Columns("q", "a", keep=("kind",)), "so kind is missing"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, rows, columns, message):
    with pytest.raises(ValueError, match=message):
        own_rows([write(tmp_path / "a.jsonl", *rows)], columns)


def test_rows_without_question_or_answer_are_counted(tmp_path):
    file = write(tmp_path / "a.jsonl", {"q": "", "a": "!"}, {"q": "?", "a": None}, {"q": "?", "a": "!"})
    rows, num_skipped = own_rows([file], Columns("q", "a"))
    assert (len(rows), num_skipped) == (1, 2)


@given(st.text(min_size=1), st.text(min_size=1), st.none() | st.text(min_size=1))
@settings(deadline=None)
def test_chat_says_the_same(question, answer, system):
    messages = as_chat({"input": question, "output": answer}, system)["messages"]
    assert [turn["content"] for turn in messages if turn["role"] != "system"] == [question, answer]
    assert [turn["content"] for turn in messages if turn["role"] == "system"] == ([system] if system else [])


def test_prepare_takes_own_files_and_writes_chat(tmp_path):
    file = write(tmp_path / "a.jsonl", *({"q": f"{n}?", "a": f"{n}!", "kind": "k"} for n in range(20)))
    columns = Columns("q", "a", keep=("kind",))
    prepared = prepare("own", [file], tmp_path / "out", columns=columns, chat=True, system="Be brief.")
    assert prepared.num_rows == {"training.jsonl": 16, "validation.jsonl": 2, "testing.jsonl": 2}
    for row in read_records(tmp_path / "out/training.jsonl"):
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert row["kind"] == "k"
