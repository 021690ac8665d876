import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from nvflare_llm_components.data.prepare import INSTRUCTION_SETS, prepare, split
from nvflare_llm_components.data.records import read_records

SHARED = Path(os.environ.get("LLM_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
FILES = ["training.jsonl", "validation.jsonl", "testing.jsonl"]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dolly_rows(num_rows: int) -> list[dict]:
    return [
        {
            "instruction": f"ask {i}",
            "context": f"about {i}" if i % 2 else "",
            "response": f"say {i}",
            "category": "x",
        }
        for i in range(num_rows)
    ]


def message(message_id: str, parent: str | None, **changes: object) -> dict:
    role = "prompter" if parent is None else "assistant"
    rank = None if parent is None else 0.0
    row = {"message_id": message_id, "parent_id": parent, "text": f"text of {message_id}", "role": role}
    return row | {"lang": "en", "rank": rank, "deleted": False} | changes


def written(out: Path) -> list[dict]:
    return [row for name in FILES for row in read_records(out / name)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_prepare_gives_the_same_bytes_for_every_format_and_for_the_same_seed(tmp_path, suffix):
    expected = tmp_path / "expected"
    prepare("dolly", [write(tmp_path / "raw.jsonl", dolly_rows(40))], expected, seed=3)
    prepare("dolly", [write(tmp_path / f"other{suffix}", dolly_rows(40))], tmp_path / "out", seed=3)
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes()


def test_prepare_draws_another_order_for_another_seed(tmp_path):
    raw = [write(tmp_path / "raw.jsonl", dolly_rows(40))]
    prepare("dolly", raw, tmp_path / "a", seed=1)
    prepare("dolly", raw, tmp_path / "b", seed=2)
    assert (tmp_path / "a/training.jsonl").read_bytes() != (tmp_path / "b/training.jsonl").read_bytes()


def test_context_and_instruction_come_in_both_orders(tmp_path):
    prepare("dolly", [write(tmp_path / "raw.jsonl", dolly_rows(60))], tmp_path / "out")
    inputs = [row["input"] for row in written(tmp_path / "out")]
    with_context = [text for text in inputs if "about" in text]
    assert len(with_context) == 30
    assert {text.startswith("ask") for text in with_context} == {True, False}
    assert all(text.count("\n\n") == 1 for text in with_context)
    assert all("\n" not in text for text in inputs if "about" not in text)


def test_several_files_are_concatenated_and_a_tenth_held_out_twice(tmp_path):
    rows = dolly_rows(100)
    raw = [write(tmp_path / "a.jsonl", rows[:30]), write(tmp_path / "b.parquet", rows[30:])]
    prepared = prepare("dolly", raw, tmp_path / "out")
    assert prepared.num_rows == {"training.jsonl": 80, "validation.jsonl": 10, "testing.jsonl": 10}
    assert sorted(row["output"] for row in written(tmp_path / "out")) == sorted(
        row["response"] for row in rows
    )


def test_rows_without_prompt_or_answer_are_skipped_and_counted(tmp_path):
    rows = [*dolly_rows(10), {"instruction": " ", "context": "c", "response": "r"}]
    rows.append({"instruction": "i", "context": "c", "response": None})
    prepared = prepare("dolly", [write(tmp_path / "raw.jsonl", rows)], tmp_path / "out")
    assert (prepared.num_skipped, sum(prepared.num_rows.values())) == (2, 10)


def test_alpaca_joins_input_and_instruction(tmp_path):
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}] * 5
    prepare("alpaca", [write(tmp_path / "raw.json", rows)], tmp_path / "out")
    assert {row["input"] for row in written(tmp_path / "out")} <= {"add\n\n1 2", "1 2\n\nadd"}


def test_oasst1_keeps_english_best_replies_with_their_prompt(tmp_path):
    rows = [message("p", None), message("best", "p"), message("second", "p", rank=1.0)]
    rows += [message("unranked", "p", rank=None), message("gone", "p", deleted=True)]
    rows += [message("french", "p", lang="fr"), message("orphan", "nowhere")]
    rows += [message("p2", None, deleted=True), message("reply to deleted", "p2")]
    rows += [message("follow-up", "best", role="prompter", rank=0), message("last", "follow-up", text="done")]
    prepare(
        "oasst1",
        [write(tmp_path / "raw.jsonl", rows)],
        tmp_path / "out",
        validation_fraction=0,
        test_fraction=0,
    )
    found = {(row["input"], row["output"]) for row in read_records(tmp_path / "out/training.jsonl")}
    assert found == {("text of p", "text of best"), ("text of follow-up", "done")}


def test_oasst1_finds_a_prompt_in_another_file(tmp_path):
    raw = [
        write(tmp_path / "a.jsonl", [message("b", "p")]),
        write(tmp_path / "b.jsonl", [message("p", None)]),
    ]
    prepared = prepare("oasst1", raw, tmp_path / "out", validation_fraction=0, test_fraction=0)
    assert prepared.num_rows["training.jsonl"] == 1


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    rows = [*dolly_rows(4), {"instruction": "odd \ud83d", "context": "", "response": "ok"}]
    prepare("dolly", [write(tmp_path / "raw.jsonl", rows)], tmp_path / "out")
    assert "odd ?" in {row["input"] for row in written(tmp_path / "out")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "raw.jsonl",
            '{"instruction": "a", "response": "b"}\n',
            r"row 1: expected the columns .* context is missing",
        ),
        ("raw.jsonl", '{"instruction": 1}\n{oops\n', r"line 2: expected a JSON object"),
        ("raw.jsonl", "[1]\n", r"line 1: expected a JSON object. Found list"),
        ("raw.jsonl", "\n", r"expected at least one row"),
        ("raw.json", '{"a": 1}', r"expected a list of JSON objects. Found dict. Is it a .jsonl file\?"),
        ("raw.json", '{"a": 1}\n{"a": 2}', r"Found invalid JSON"),
        ("raw.parquet", "no parquet", r"expected a parquet file"),
        ("raw.csv", "instruction,context\na,b,c\n", r"line 2: expected as many values as the first line has"),
        ("raw.csv", "instruction,context\na\n", r"line 2: expected as many values as the first line has"),
        ("raw.csv", 'instruction,context\n"a"b,c\n', r"expected CSV in UTF-8. Found, after row 0"),
        ("raw.xlsx", "a,b", r"the suffix should be one of .jsonl, .json, .csv, .parquet. Found '.xlsx'"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        prepare("dolly", [tmp_path / name], tmp_path / "out")
    assert name in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_file_unknown_set_and_too_few_rows_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Found no file"):
        prepare("dolly", [tmp_path / "none.jsonl"], tmp_path)
    with pytest.raises(ValueError, match=r"expected one of dolly, alpaca, oasst1, own\. Found 'squad'"):
        prepare("squad", [], tmp_path)
    with pytest.raises(ValueError, match="Splitting 2 usable rows"):
        prepare("dolly", [write(tmp_path / "raw.jsonl", dolly_rows(2))], tmp_path / "out")
    with pytest.raises(ValueError, match="`test_fraction` should be at least 0 and below 1"):
        split([], 0.1, 1.0)


@given(st.integers(1, 300), st.floats(0, 0.45), st.floats(0, 0.45))
@settings(deadline=None)
def test_split_puts_every_row_into_exactly_one_file(num_rows, validation_fraction, test_fraction):
    rows = [{"row": i} for i in range(num_rows)]
    try:
        parts = split(rows, validation_fraction, test_fraction)
    except ValueError:
        assert num_rows < 20
        return
    assert sorted(row["row"] for part in parts.values() for row in part) == list(range(num_rows))
    assert parts["training.jsonl"]


@pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"needs the published samples in {SHARED.name}/ beside the repository"
)
@pytest.mark.parametrize(
    ("name", "pattern", "num_pairs"),
    [("dolly", "databricks-dolly*", 151), ("alpaca", "alpaca*", 334), ("oasst1", "oasst1*", 172)],
)
def test_published_samples_are_prepared(tmp_path, name, pattern, num_pairs):
    raw = sorted(SHARED.glob(pattern))
    prepared = prepare(name, raw, tmp_path)
    rows = written(tmp_path)
    assert sum(prepared.num_rows.values()) == len(rows) == num_pairs
    assert all(set(row) == {"input", "output"} and row["input"] and row["output"] for row in rows)


def test_the_three_sets_are_named():
    assert list(INSTRUCTION_SETS) == ["dolly", "alpaca", "oasst1"]
