"""Rows of a data file as plain dictionaries, whatever of the three usual formats it has.

JSON is parsed by the standard library rather than by pandas: an error then names its line, and no value is
guessed into another type.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pyarrow import ArrowInvalid, parquet

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Reads every row of a ``.jsonl``, ``.json`` or ``.parquet`` file.

    Args:
        path: a file whose suffix tells its format; a ``.json`` file holds one list of objects.

    Returns:
        The rows in file order, as builtins (a null is ``None``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is none of the three, the content is not what it says, or there is no row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a data file (.jsonl, .json or .parquet). Found no file.")
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


def _read_parquet(path: Path) -> list[Record]:
    try:
        rows: list[Record] = parquet.read_table(path).to_pylist()
    except ArrowInvalid as e:
        raise ValueError(f"{path}: expected a parquet file. Found what pyarrow refuses: {e}.") from e
    return rows


_READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
