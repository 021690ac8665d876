"""A site's file of rows: its formats, and limits beyond which it is refused before it takes memory."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pyarrow import ArrowException, parquet

from nvflare_llm_components.tensors.errors import ReportableError

Row = dict[str, Any]
_JSON_LINES = 16  # lines' worth of bytes that a whole .json file may have
_BATCH_ROWS = 16
_INFLATION = 100  # text of real data sets is packed to a fifth; a bomb to a ten thousandth
_FLOOR_BYTES = 2**24
_EXTRA = ("tools",)


class MissingFileError(ReportableError, FileNotFoundError):
    """A file that a job names is not there."""


@dataclass(frozen=True, kw_only=True)
class RowLimits:
    """How much of a file is read.

    Attributes:
        min_rows: Least number of rows.
        max_rows: Rows at most.
        max_bytes: Bytes of the file, and of the text in it, at most.
        max_line_bytes: Bytes of one line of JSON; a ``.json`` file may have 16 times that.
    """

    min_rows: int = 1
    max_rows: int = 10_000_000
    max_bytes: int = 16 * 2**30
    max_line_bytes: int = 4 * 2**20


def read_rows(
    path: Path, argument: str, limits: RowLimits, columns: Sequence[str]
) -> Iterator[tuple[int, Row]]:
    """Rows of one file, each with its number from 1 (of its line, in JSON lines).

    Args:
        path: ``.parquet``, ``.json`` (a list of objects), or JSON lines.
        argument: Name of the setting that holds the path, for error messages.
        limits: How much is read.
        columns: What is read of a parquet file.

    Raises:
        MissingFileError: There is no such file.
        ReportableError: It is too large, or not of its format; with the number of the row, and nothing of it.
    """
    if not path.is_file():
        raise MissingFileError(
            f"{argument}: expected a data file, found nothing at '{path}'. "
            "Correct the path in the job, or copy the file."
        )
    where = f"{argument}: '{path}'"
    _check("bytes", path.stat().st_size, limits.max_bytes, where)
    if path.suffix == ".parquet":
        rows = _parquet(path, where, limits, columns)
    elif path.suffix == ".json":
        rows = _list(path, where, limits)
    else:
        rows = _lines(path, where, limits)
    for count, numbered in enumerate(rows, 1):
        _check("rows", count, limits.max_rows, where)
        yield numbered


def _check(what: str, found: int, most: int, where: str) -> None:
    if found > most:
        raise ReportableError(
            f"{where}: expected at most {most:,} {what}, found {found:,}. Split the file, or let the site's "
            "administrator raise the limit in [data] of its policy."
        )


def _lines(path: Path, where: str, limits: RowLimits) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(_short_lines(file, where, limits.max_line_bytes), 1):
            if line.strip():
                yield number, _object(_parsed(line, f"{where}, row {number}"), f"{where}, row {number}")


def _short_lines(file: IO[bytes], where: str, most: int) -> Iterator[bytes]:
    number = 1
    while line := file.readline(most + 1):
        _check(f"bytes in row {number}", len(line), most, where)
        yield line
        number += 1


def _list(path: Path, where: str, limits: RowLimits) -> Iterator[tuple[int, Row]]:
    _check(
        "bytes in a .json file (.jsonl may be larger)",
        path.stat().st_size,
        _JSON_LINES * limits.max_line_bytes,
        where,
    )
    found = _parsed(path.read_bytes(), where)
    if not isinstance(found, list):
        raise ReportableError(f"{where}: expected a list of JSON objects, found {type(found).__name__}.")
    for number, row in enumerate(found, 1):
        yield number, _object(row, f"{where}, row {number}")


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
    except UnicodeDecodeError:
        problem = "bytes that are not UTF-8"
    except ValueError:
        problem = "a number of too many digits"
    except RecursionError:
        problem = "lists or objects nested too deeply"
    raise ReportableError(f"{where}: expected JSON, found it unreadable: {problem}.")


def _object(found: Any, where: str) -> Row:
    if not isinstance(found, dict):
        raise ReportableError(f"{where}: expected a JSON object, found {type(found).__name__}.")
    return found


def _parquet(path: Path, where: str, limits: RowLimits, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    most = min(limits.max_bytes, max(_FLOOR_BYTES, _INFLATION * path.stat().st_size))
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in (*columns, *_EXTRA) if name in file.schema_arrow.names]
            _check("rows", file.metadata.num_rows, limits.max_rows, where)
            _check("bytes when unpacked", _unpacked_bytes(file.metadata, names), most, where)
            if not names:
                names = file.schema_arrow.names  # for the error that says so
            total, number = 0, 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
                # A dictionary's one entry may stand in every row.
                total += batch.nbytes
                _check("bytes when unpacked", total, most, where)
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except ArrowException as error:
        raise ReportableError(
            f"{where}: expected a parquet file, found it unreadable ({type(error).__name__}). Copy it again."
        ) from error


def _unpacked_bytes(metadata: Any, names: Sequence[str]) -> int:
    total = 0
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if column.path_in_schema.split(".")[0] in names:
                total += max(column.total_uncompressed_size, 0)
    return total
