"""Turns published instruction sets into rows of ``{"input", "output"}``, split and seeded."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvflare_llm_components.data.own_rows import Columns, as_chat, own_rows
from nvflare_llm_components.data.records import Record, read_records, text_of, write_jsonl

OWN = "own"
Pair = tuple[tuple[str, ...], str]
"""Parts of a prompt (each non-empty, one or two of them) and the answer."""


@dataclass(frozen=True)
class InstructionSet:
    """How one published set is read.

    Attributes:
        columns: what every row must have.
        pairs: maps the rows of all files to prompts and answers.
    """

    columns: tuple[str, ...]
    pairs: Callable[[Sequence[Record]], Iterable[Pair]]


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` wrote.

    Attributes:
        num_rows: rows by file name.
        num_skipped: raw rows that gave no pair: prompt or answer is empty, or (oasst1) no best English reply.
    """

    num_rows: dict[str, int]
    num_skipped: int


def prepare(
    name: str,
    raw: Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    columns: Columns | None = None,
    chat: bool = False,
    system: str | None = None,
) -> Prepared:
    """Writes ``training.jsonl``, ``validation.jsonl`` and ``testing.jsonl`` of ``{"input", "output"}`` rows.

    A published set's context and its instruction are joined by a blank line in an order drawn for each row;
    then rows are shuffled and split. The same files in the same order and the same seed give the same bytes.

    Args:
        name: one of :data:`INSTRUCTION_SETS`, or ``own`` for files of one's own.
        raw: files of that set; several are concatenated.
        out: folder to write into.
        seed: of the drawn orders and of the shuffle.
        validation_fraction: share of the rows held out for validation, from 0 to below 1.
        test_fraction: share held out for testing.
        columns: of ``own``, what the columns hold.
        chat: write ``{"messages"}`` rows, to which the model's chat template is applied in training.
        system: with `chat`, a system message before each question.

    Returns:
        Row counts.

    Raises:
        FileNotFoundError: a raw file is missing.
        ValueError: the name, a column, a file's content or the fractions are not as expected.
    """
    draw = random.Random(seed)
    if name == OWN:
        rows, num_skipped = own_rows(raw, columns or Columns())
    else:
        rows, num_skipped = _published(name, raw, draw)
    draw.shuffle(rows)
    splits = split(rows, validation_fraction, test_fraction)
    for file_name, part in splits.items():
        write_jsonl(out / file_name, [as_chat(row, system) for row in part] if chat else part)
    return Prepared({file: len(part) for file, part in splits.items()}, num_skipped)


def _published(name: str, raw: Sequence[Path], draw: random.Random) -> tuple[list[Record], int]:
    if name not in INSTRUCTION_SETS:
        raise ValueError(f"Data set: expected one of {', '.join([*INSTRUCTION_SETS, OWN])}. Found {name!r}.")
    records = _read_all(INSTRUCTION_SETS[name].columns, raw)
    rows = [
        {"input": "\n\n".join(draw.sample(parts, len(parts))), "output": answer}
        for parts, answer in INSTRUCTION_SETS[name].pairs(records)
    ]
    return rows, len(records) - len(rows)


def split(
    rows: Sequence[Record], validation_fraction: float, test_fraction: float
) -> dict[str, list[Record]]:
    """Cuts rows, in their order, into testing, validation and training rows.

    A fraction above 0 holds out one row at least, so that a small file has something to evaluate on.

    Args:
        rows: all rows, shuffled before.
        validation_fraction: share for validation.
        test_fraction: share for testing.

    Returns:
        Rows by file name; every row is in exactly one file.

    Raises:
        ValueError: a fraction is out of range, or nothing would be left to train on.
    """
    for option, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"`{option}` should be at least 0 and below 1. Found {fraction}.")
    num_validation = _num_held_out(len(rows), validation_fraction)
    num_held_out = num_validation + _num_held_out(len(rows), test_fraction)
    if num_held_out >= len(rows):
        raise ValueError(
            f"Splitting {len(rows)} usable rows: expected some left for training. "
            f"Found {num_held_out} to hold out. Give more rows, or smaller fractions."
        )
    return {
        "training.jsonl": list(rows[num_held_out:]),
        "validation.jsonl": list(rows[:num_validation]),
        "testing.jsonl": list(rows[num_validation:num_held_out]),
    }


def _num_held_out(num_rows: int, fraction: float) -> int:
    return max(1, round(num_rows * fraction)) if fraction else 0


def _read_all(columns: Sequence[str], files: Sequence[Path]) -> list[Record]:
    if not files:
        raise ValueError("Raw files: expected at least one. Found none.")
    records: list[Record] = []
    for file in files:
        rows = read_records(file)
        _require_columns(file, columns, rows)
        records += rows
    return records


def _require_columns(file: Path, columns: Sequence[str], rows: Sequence[Record]) -> None:
    for number, row in enumerate(rows, 1):
        missing = [column for column in columns if column not in row]
        if missing:
            raise ValueError(
                f"{file}, row {number}: expected the columns {', '.join(columns)}. "
                f"Found {', '.join(row)}, so {', '.join(missing)} is missing. Is it a file of this data set?"
            )


def _pairs_of_columns(first: str, second: str, answer: str) -> Callable[[Sequence[Record]], Iterable[Pair]]:
    def pairs(records: Sequence[Record]) -> Iterable[Pair]:
        for record in records:
            instruction, context, output = (text_of(record[column]) for column in (first, second, answer))
            if instruction and output:
                yield ((context, instruction) if context else (instruction,)), output

    return pairs


def _oasst1_pairs(records: Sequence[Record]) -> Iterable[Pair]:
    """English best-ranked replies with the message they answer; deleted messages count for nothing."""
    messages = {record["message_id"]: record for record in records if not record["deleted"]}
    for message in messages.values():
        parent = messages.get(message["parent_id"])
        if parent is None or not _is_best_english_reply(message):
            continue
        prompt, answer = text_of(parent["text"]), text_of(message["text"])
        if prompt and answer:
            yield (prompt,), answer


def _is_best_english_reply(message: Record) -> bool:
    return bool(message["role"] == "assistant" and message["lang"] == "en" and message["rank"] == 0)


INSTRUCTION_SETS = {
    "dolly": InstructionSet(
        columns=("instruction", "context", "response"),
        pairs=_pairs_of_columns("instruction", "context", "response"),
    ),
    "alpaca": InstructionSet(
        columns=("instruction", "input", "output"),
        pairs=_pairs_of_columns("instruction", "input", "output"),
    ),
    "oasst1": InstructionSet(
        columns=("message_id", "parent_id", "text", "role", "lang", "rank", "deleted"),
        pairs=_oasst1_pairs,
    ),
}
