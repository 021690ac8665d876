"""Instruction rows from a site's file, in the two shapes that TRL understands."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from pyarrow import parquet

ANSWER_CUE = "\n\nResponse:\n"
"""Ends the prompt of an ``input``/``output`` row. The line break is a token boundary in common tokenizers,
so the prompt alone and the prompt with its completion are cut alike."""

Row = dict[str, Any]
_TEXT_COLUMNS = (("input", "output"), ("prompt", "completion"), ("text",))


def load_rows(path: Path, argument: str) -> Dataset:
    """Read one file of instruction rows.

    Args:
        path: ``.jsonl``, ``.json`` (a list of objects) or ``.parquet``.
        argument: Name of the setting that holds the path, for error messages.

    Returns:
        A dataset with columns ``prompt`` and ``completion`` (text, or lists of chat messages), or ``text``.
        The prompt carries no loss in training.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is empty, is not of a known format, or a row lacks the known columns.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}: expected a data file, found nothing at '{path}'. "
            "Correct the path in the job, or copy the file."
        )
    rows = _read(path, argument)
    if not rows:
        raise ValueError(f"{argument}: expected at least one row, found an empty file '{path}'.")
    convert = _conversion(rows[0], path, argument)
    return Dataset.from_list([convert(row, number) for number, row in enumerate(rows, 1)])


def _read(path: Path, argument: str) -> list[Row]:
    if path.suffix == ".parquet":
        found: list[Row] = parquet.read_table(path).to_pylist()
        return found
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".json":
            return _objects(json.load(file), path, argument)
        return list(_lines(file, path, argument))


def _objects(found: Any, path: Path, argument: str) -> list[Row]:
    if isinstance(found, list) and all(isinstance(row, dict) for row in found):
        return found
    raise ValueError(f"{argument}: expected a list of JSON objects, found another structure in '{path}'.")


def _lines(lines: Iterable[str], path: Path, argument: str) -> Iterable[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{argument}: expected one JSON object a line, found line {number} of '{path}' unreadable: "
                f"{error}."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{argument}: expected one JSON object a line, found {type(row).__name__} in line {number} "
                f"of '{path}'."
            )
        yield row


def _conversion(first: Row, path: Path, argument: str) -> Callable[[Row, int], Row]:
    """The conversion that the first row's columns ask for; every further row must have the same columns."""
    where = f"{argument}: '{path}'"
    if "messages" in first:
        return lambda row, number: _from_messages(row, f"{where}, row {number}")
    for columns in _TEXT_COLUMNS:
        if all(column in first for column in columns):
            return _text_conversion(columns, where)
    raise ValueError(
        f"{where}: expected columns input and output, prompt and completion, messages, or text; "
        f"found {', '.join(sorted(first)) or 'none'}. Prepare the file with `nvflare-llm prepare`."
    )


def _text_conversion(columns: tuple[str, ...], where: str) -> Callable[[Row, int], Row]:
    return lambda row, number: _from_text(row, columns, f"{where}, row {number}")


def _from_text(row: Row, columns: tuple[str, ...], where: str) -> Row:
    for column in columns:
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{where}: expected text in column '{column}', found {type(row.get(column)).__name__}. "
                "Give every row the same columns."
            )
    if columns == ("text",):
        return {"text": row["text"]}
    first, second = (row[column] for column in columns)
    return {"prompt": first + ANSWER_CUE if columns[0] == "input" else first, "completion": second}


def _from_messages(row: Row, where: str) -> Row:
    messages = row.get("messages")
    if (
        not isinstance(messages, list)
        or not messages
        or not all(_is_message(message) for message in messages)
    ):
        raise ValueError(
            f"{where}: expected a list of {{'role', 'content'}} in column 'messages', found {messages!r:.80}."
        )
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: expected a question and a last message of role 'assistant', found {len(turns)} "
            f"messages, "
            f"the last of role '{turns[-1]['role']}'. Cut the conversation after an answer."
        )
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
