"""Rows of a data file as plain dictionaries, whatever of the usual formats it has.

JSON is parsed by the standard library rather than by pandas: an error then names its line, and no value is
guessed into another type.
"""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pyarrow import ArrowInvalid, parquet

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Reads every row of a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file.

    Args:
        path: a file whose suffix tells its format; a ``.json`` file holds one list of objects, and a
            ``.csv`` file has its columns' names in its first line.

    Returns:
        The rows in file order, as builtins (a null is ``None``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is none of these, the content is not what it says, or there is no row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a data file ({', '.join(_READERS)}). Found no file.")
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path}: the suffix should be one of {', '.join(_READERS)}. Found {path.suffix!r}.")
    records = reader(path)
    if not records:
        raise ValueError(f"{path}: expected at least one row. Found none.")
    return records


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Writes one JSON object a line, the same bytes on every platform, making the folder where it is missing.

    Args:
        path: file to write; one that exists is replaced.
        records: rows; a value JSON does not know (a date) is written as its text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def text_of(value: object) -> str:
    """Text without outer white space; half a surrogate pair, which UTF-8 cannot hold, becomes ``?``."""
    return str(value).strip().encode("utf-8", "replace").decode("utf-8") if value is not None else ""


def _read_jsonl(path: Path) -> list[Record]:
    with path.open(encoding="utf-8") as file:
        return [_parse_line(path, number, line) for number, line in enumerate(file, 1) if line.strip()]


def _parse_line(path: Path, number: int, line: str) -> Record:
    try:
        return _require_object(json.loads(line), f"{path}, line {number}")
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {number}: expected a JSON object. Found invalid JSON: {e}.") from e


def _read_json(path: Path) -> list[Record]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: expected a list of JSON objects. Found invalid JSON: {e}.") from e
    if not isinstance(content, list):
        found = type(content).__name__
        raise ValueError(f"{path}: expected a list of JSON objects. Found {found}. Is it a .jsonl file?")
    return [_require_object(item, f"{path}, item {number}") for number, item in enumerate(content, 1)]


def _require_object(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object. Found {type(value).__name__}.")
    return value


def _read_csv(path: Path) -> list[Record]:
    """Comma-separated text with quotes as spreadsheets write it; every value is text."""
    # Spreadsheets begin UTF-8 with a mark, which is no part of the first name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows: list[Record] = []
        try:
            for row in reader:
                rows.append(_require_columns(row, f"{path}, line {reader.line_num}"))
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(f"{path}: expected CSV in UTF-8. Found, after row {len(rows)}: {e}.") from e
    return rows


def _require_columns(row: Record, where: str) -> Record:
    if None in row or None in row.values():
        raise ValueError(
            f"{where}: expected as many values as the first line has names. Found another number."
        )
    return row


def _read_parquet(path: Path) -> list[Record]:
    try:
        rows: list[Record] = parquet.read_table(path).to_pylist()
    except ArrowInvalid as e:
        raise ValueError(f"{path}: expected a parquet file. Found what pyarrow refuses: {e}.") from e
    return rows


_READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
