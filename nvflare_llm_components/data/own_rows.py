"""A person's own rows: columns named or recognised, as prompt and answer or as chat messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvflare_llm_components.data.records import Record, read_records, text_of

_PAIRS = (("input", "output"), ("prompt", "completion"))
_MESSAGES = "messages"


@dataclass(frozen=True)
class Columns:
    """What a person says of their files.

    Attributes:
        input: column of the question; None where it is to be recognised.
        output: column of the answer.
        context: column of what belongs to the question; it follows it after a blank line.
        keep: further columns to keep, by which sites may differ.
    """

    input: str | None = None
    output: str | None = None
    context: str | None = None
    keep: tuple[str, ...] = ()


def own_rows(files: Sequence[Path], columns: Columns) -> tuple[list[Record], int]:
    """Rows of ``{"input", "output"}`` or ``{"messages"}``, and how many had no question or no answer.

    Args:
        files: ``.jsonl``, ``.json``, ``.csv`` or ``.parquet``.
        columns: which hold what.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a row lacks a column, or the columns are not known.
    """
    if bool(columns.input) != bool(columns.output):
        raise ValueError("--input-column and --output-column: expected both. Found one.")
    if not files:
        raise ValueError("Files: expected at least one. Found none.")
    rows: list[Record] = []
    num_skipped = 0
    for file in files:
        records = read_records(file)
        names = _names(file, records[0], columns)
        for number, record in enumerate(records, 1):
            row = _row(f"{file}, row {number}", record, names, columns.keep)
            rows += [row] if row else []
            num_skipped += not row
    return rows, num_skipped


def as_chat(row: Record, system: str | None = None) -> Record:
    """A row of ``{"input", "output"}`` as ``{"messages"}``; one of messages as it is.

    >>> as_chat({"input": "2 + 2?", "output": "4"})["messages"][1]
    {'role': 'assistant', 'content': '4'}
    """
    if _MESSAGES in row:
        return row
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
    others = {name: value for name, value in row.items() if name not in _PAIRS[0]}
    return {_MESSAGES: [*first, *turns], **others}


def _names(file: Path, first: Record, columns: Columns) -> tuple[str, ...]:
    """The columns to read: of messages, or of question, answer and perhaps context."""
    if columns.input and columns.output:
        return (columns.input, columns.output, *([columns.context] if columns.context else []))
    if _MESSAGES in first:
        return (_MESSAGES,)
    found = next((pair for pair in _PAIRS if all(name in first for name in pair)), None)
    if found is None:
        raise ValueError(
            f"{file}: expected the columns input and output, prompt and completion, or messages. Found "
            f"{', '.join(first)}. Say which hold question and answer: --input-column A --output-column B."
        )
    return (*found, *([columns.context] if columns.context else []))


def _row(where: str, record: Record, names: tuple[str, ...], keep: tuple[str, ...]) -> Record | None:
    missing = [name for name in (*names, *keep) if name not in record]
    if missing:
        raise ValueError(
            f"{where}: expected the columns {', '.join((*names, *keep))}. Found {', '.join(record)}, so "
            f"{', '.join(missing)} is missing."
        )
    kept = {name: record[name] for name in keep}
    if names == (_MESSAGES,):
        return {_MESSAGES: record[_MESSAGES], **kept} if record[_MESSAGES] else None
    question, answer, *context = (text_of(record[name]) for name in names)
    if not question or not answer:
        return None
    return {"input": "\n\n".join([question, *filter(None, context)]), "output": answer, **kept}
