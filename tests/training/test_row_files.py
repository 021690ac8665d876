"""Files of rows that are bombs, or no rows: refused by their number and size, before they take memory."""

import json
import resource
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from subprocess import run

import pyarrow as pa
import pytest
from pyarrow import parquet

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.training.row_files import RowLimits, read_rows
from nvflare_llm_components.training.rows import load_rows

SECRET = "Jane Doe, diabetes"
GIB = 2**30


def repeated(path: Path) -> None:
    """One text in a million rows: a dictionary of one entry."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 10**6, pa.int32()), ["x" * 2000])
    table = pa.table({"text": column})
    parquet.write_table(table, path, compression="zstd")


def zeros(path: Path) -> None:
    """Few rows of one letter, packed a thousand times smaller."""
    table = pa.table({"text": ["x" * 2**26]})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)


def many(path: Path) -> None:
    """Twenty million empty rows."""
    table = pa.table({"text": pa.array([""] * 10**6).dictionary_encode()})
    with parquet.ParquetWriter(path, table.schema) as writer:
        for _ in range(20):
            writer.write_table(table)


@pytest.mark.parametrize("bomb", [repeated, zeros, many])
def test_a_small_parquet_file_takes_little_memory(bomb: Callable[[Path], None], tmp_path: Path):
    """In a process of its own, whose peak memory is its own."""
    bomb(tmp_path / "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < 2**20
    code = f"""
        import resource
        from pathlib import Path
        from nvflare_llm_components.tensors.errors import ReportableError
        from nvflare_llm_components.training.row_files import RowLimits, read_rows
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            for _ in read_rows(Path({str(tmp_path / "rows.parquet")!r}), "train_data", RowLimits(), ["text"]):
                pass
        except ReportableError as error:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
    """
    done = run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    taken_kib, _, words = done.stdout.partition(" ")
    assert int(taken_kib) * 1024 < GIB
    assert "expected at most" in words


def test_the_peak_is_told_in_kib_here():
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 1000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize(
    "content",
    [
        SECRET.encode(),
        json.dumps([SECRET]).encode(),
        json.dumps({"text": SECRET}).encode() + b"\n" + SECRET.encode(),
        json.dumps({SECRET: 1}).encode(),
        json.dumps([{SECRET: 1}]).encode(),
        json.dumps({"text": [SECRET]}).encode(),
        json.dumps({"messages": SECRET}).encode(),
        json.dumps({"messages": [{"role": SECRET, "content": SECRET}] * 2}).encode(),
        json.dumps({"messages": [{"role": "user", "content": [SECRET]}]}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": SECRET}).encode(),
        SECRET.encode() + b"\xff\xfe",
        b"[" * 100_000 + SECRET.encode(),
        b'{"text": "' + SECRET.encode(),
    ],
)
def test_no_error_tells_what_is_in_a_row(content: bytes, name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ReportableError) as caught:
        load_rows(tmp_path / name, "train_data")
    assert "train_data" in str(caught.value)
    assert all(word not in str(caught.value) for word in ("Jane", "Doe", "diabetes"))


@pytest.mark.parametrize(
    ("name", "content", "limits", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n' * 3, {"max_rows": 2}, "at most 2 rows, found 3"),
        ("a.jsonl", b'{"text": "a"}\n' * 3, {"max_bytes": 20}, "at most 20 bytes, found 42"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "aaaaaaaaaaaaaaaaaaaa"}',
            {"max_line_bytes": 20},
            "bytes in row 2",
        ),
        ("a.json", b'[{"text": "a"}]' + b" " * 400, {"max_line_bytes": 20}, "bytes in a .json file"),
        ("a.jsonl", b'{"text": "a"}\n', {"min_rows": 2}, "at least 2 rows, found 1"),
    ],
)
def test_limits_are_named(name: str, content: bytes, limits: dict[str, int], words: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ReportableError, match=words):
        load_rows(tmp_path / name, "train_data", RowLimits(**limits))


def test_a_line_without_an_end_is_not_read_whole(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(8 * GIB)  # a hole: no bytes on disk
    with pytest.raises(ReportableError, match="bytes in row 1"):
        list(read_rows(path, "train_data", RowLimits(), ["text"]))


def test_parquet_of_real_shape_is_read_whole_and_only_what_is_needed(tmp_path: Path):
    rows = [{"text": f"row {n} " * 50, "unused": "y" * 100} for n in range(1000)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(read_rows(tmp_path / "a.parquet", "train_data", RowLimits(), ["text"]))
    assert found == [(n, {"text": row["text"]}) for n, row in enumerate(rows, 1)]
