"""Instruction rows from a site's file, in the two shapes that TRL understands."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.text import ANSWER_CUE
from nvflare_llm_components.training.row_files import MissingFileError, Row, RowLimits, read_rows

__all__ = ["MissingFileError", "RowLimits", "load_rows"]

logger = logging.getLogger(__name__)
_KINDS = (("messages",), ("input", "output"), ("prompt", "completion"), ("text",))
COLUMNS = tuple(name for kind in _KINDS for name in kind)
_ROLES = ("system", "developer", "user", "assistant", "tool")
_Convert = Callable[[Row, str], Iterable[Row]]
_GROWTH = 32  # of a file of conversations, at most, as rows
_FLOOR_BYTES = 2**26
_TURN_BYTES = 32  # of a message, beside its text


def load_rows(path: Path, argument: str, limits: RowLimits | None = None) -> Dataset:
    """Read one file of instruction rows.

    Args:
        path: ``.jsonl``, ``.json`` (a list of objects) or ``.parquet``.
        argument: Name of the setting that holds the path, for error messages.
        limits: How much is read.

    Returns:
        A dataset with columns ``prompt`` and ``completion`` (text, or lists of chat messages), or ``text``.
        The prompt carries no loss in training. A conversation gives one row for each answer in it, with all
        that came before as its prompt. ``tools`` beside ``messages`` is kept, as JSON text.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is empty, too large, not of a known format, or a row lacks the known columns. Its
            text names the row, and never what is in it.
    """
    limits = limits or RowLimits()
    where = f"{argument}: '{path}'"
    convert: _Convert | None = None
    converted: list[Row] = []
    room = _Room(path, limits)
    for number, row in read_rows(path, argument, limits, COLUMNS):
        convert = convert or _conversion(row, where)
        for part in convert(row, f"{where}, row {number}"):
            room.take(part, f"{where}, row {number}")
            converted.append(part)
    if not converted:
        raise ReportableError(f"{argument}: expected at least one row, found an empty file '{path}'.")
    if len(converted) < limits.min_rows:
        raise ReportableError(
            f"{where}: this site's policy expects at least {limits.min_rows} rows, found {len(converted)}."
        )
    return Dataset.from_list(converted)


class _Room:
    """How much the rows may take: a conversation of n answers grows to n rows, with n times its text."""

    def __init__(self, path: Path, limits: RowLimits) -> None:
        size = path.stat().st_size if path.is_file() else 0
        self._most = self._left = min(limits.max_bytes, max(_FLOOR_BYTES, _GROWTH * size))

    def take(self, row: Row, where: str) -> None:
        prompt = row.get("prompt")
        turns = prompt if isinstance(prompt, list) else ()
        self._left -= sum(_TURN_BYTES + len(turn["content"]) for turn in turns)
        self._left -= len(row["tools"]) if turns and "tools" in row else 0
        if self._left < 0:
            raise ReportableError(
                f"{where}: expected conversations that take at most {self._most:,} bytes as one row an "
                "answer, each with all that was before it, found more. Cut long conversations."
            )


def _conversion(first: Row, where: str) -> _Convert:
    """The conversion that the first row's columns ask for; every further row must have the same columns."""
    for columns in _KINDS:
        if all(column in first for column in columns):
            if columns == ("messages",):
                return _from_messages
            return lambda row, place: [_from_text(row, columns, place)]
    # Their names may be data, in a file that is none of rows.
    logger.warning("%s: found the columns %s", where, sorted(first))
    raise ReportableError(
        f"{where}: expected columns input and output, prompt and completion, messages, or text; "
        f"found {len(first)} others. Prepare the file with `nvflare-llm prepare`."
    )


def _from_text(row: Row, columns: tuple[str, ...], where: str) -> Row:
    for column in columns:
        if not isinstance(row.get(column), str):
            raise ReportableError(
                f"{where}: expected text in column '{column}', found {type(row.get(column)).__name__}. "
                "Give every row the same columns."
            )
    if columns == ("text",):
        return {"text": row["text"]}
    first, second = (row[column] for column in columns)
    return {"prompt": first + ANSWER_CUE if columns[0] == "input" else first, "completion": second}


def _from_messages(row: Row, where: str) -> Iterator[Row]:
    """One row for each answer: a chat template gives the loss of one answer, and what was before it."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ReportableError(
            f"{where}: expected a list of {{'role', 'content'}}, both text, in column 'messages', found "
            f"{_shape(messages)}."
        )
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        role = turns[-1]["role"] if turns[-1]["role"] in _ROLES else "unknown"
        raise ReportableError(
            f"{where}: expected a question and a last message of role 'assistant', found {len(turns)} "
            f"messages, the last of role '{role}'. Cut the conversation after an answer."
        )
    tools = {} if row.get("tools") is None else {"tools": _as_text(row["tools"], where)}
    return ({"prompt": prompt, "completion": [answer], **tools} for prompt, answer in _answers(turns))


def _answers(turns: list[Row]) -> Iterator[tuple[list[Row], Row]]:
    for index, turn in enumerate(turns):
        if index and turn["role"] == "assistant":
            yield turns[:index], turn


def _as_text(tools: Any, where: str) -> str:
    """Tools as JSON: as a column of objects each would get the keys of all the others."""
    listed = tools
    if isinstance(tools, str):
        try:
            listed = json.loads(tools)
        except (ValueError, RecursionError):
            listed = None
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise ReportableError(
            f"{where}: expected a list of objects in column 'tools', found another structure."
        )
    return json.dumps(listed)


def _is_message(message: Any) -> bool:
    """Calls of tools are refused: left out, the model would learn an empty answer."""
    return (
        isinstance(message, dict)
        and all(isinstance(message.get(key), str) for key in ("role", "content"))
        and not message.get("tool_calls")
    )


def _shape(messages: Any) -> str:
    if not isinstance(messages, list):
        return type(messages).__name__
    if not messages:
        return "an empty list"
    number, found = next((n, m) for n, m in enumerate(messages, 1) if not _is_message(m))
    if isinstance(found, dict) and found.get("tool_calls"):
        return f"calls of tools in message {number}, which are not trained"
    return f"another structure in message {number}"
