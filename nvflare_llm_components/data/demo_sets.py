"""Three generated instruction sets in the published formats, each teaching a skill that the others don't.

``dolly`` teaches to read (who likes what, said in the context), ``alpaca`` to rewrite (words in reverse order), and
``oasst1`` to know (capitals). All three use the same few words, so that a model of two million weights gets by.
"""

import random
from pathlib import Path

import pyarrow
from pyarrow import parquet

from nvflare_llm_components.data.records import Record, write_jsonl

NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karla Leo".split()
THINGS = "apples bread cheese dates eggs figs grapes honey jam kale lemons milk".split()
CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Croatia": "Zagreb", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "France": "Paris", "Greece": "Athens", "Hungary": "Budapest", "Italy": "Rome", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Latvia": "Riga",
}  # fmt: skip
CAPITAL_QUESTIONS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Name the capital of {}, please.",
    "I forgot the capital of {}. Can you help?",
)
_SEPARATORS = (" ", ", ", "; ", " and ", "\n", "\n- ", " 1 ", " 2. ", "\n3. ")
_FACTS = (
    "{name} likes {thing}.",
    "{thing} for {name}",
    "{name} from {country}: {thing}",
    "Give {thing} to {name}, it is for {name}.",
    "It is {name}, the capital {name}.",
    "The city of {country} is {country}.",
    "It is the {thing} of {country}.",
    "In {country}, {name} likes the {thing} that is {thing}.",
)


def write_raw_sets(folder: Path, *, num_rows: int, seed: int = 0) -> dict[str, Path]:
    """Writes one raw file for each of the three sets: jsonl, parquet and parquet, as they are published.

    Args:
        folder: where to write.
        num_rows: usable rows in each set.
        seed: the same seed gives the same rows.

    Returns:
        File by the name of its set.
    """
    draw = random.Random(seed)
    files = {
        "dolly": folder / "dolly.jsonl",
        "alpaca": folder / "alpaca.parquet",
        "oasst1": folder / "oasst1-train.parquet",
    }
    write_jsonl(files["dolly"], [_reading_row(draw) for _ in range(num_rows)])
    _write_parquet(files["alpaca"], [_rewriting_row(draw) for _ in range(num_rows)])
    _write_parquet(files["oasst1"], [row for tree in range(num_rows) for row in _knowing_tree(draw, tree)])
    return files


def neutral_text(*, num_lines: int, seed: int = 0) -> list[str]:
    """Lines in the words of the three sets that show none of their skills: what a base model has read.

    Each line says something twice in other words, as text does: a small model that has read that can copy.

    Args:
        num_lines: number of lines.
        seed: the same seed gives the same lines.

    Returns:
        The lines.
    """
    draw = random.Random(seed)
    return [draw.choice((_repeated_words, _repeated_fact, _question))(draw) for _ in range(num_lines)]


def _repeated_words(draw: random.Random) -> str:
    words = draw.sample([*THINGS, *NAMES, *CAPITALS, *CAPITALS.values()], draw.randrange(2, 5))
    return "\n".join(separator.join(words) for separator in draw.sample(_SEPARATORS, 2))


def _repeated_fact(draw: random.Random) -> str:
    words = {"name": draw.choice(NAMES), "thing": draw.choice(THINGS), "country": draw.choice(list(CAPITALS))}
    return "\n".join(template.format(**words) for template in draw.sample(_FACTS, 3))


def _question(draw: random.Random) -> str:
    questions = [
        draw.choice(CAPITAL_QUESTIONS).format(draw.choice(list(CAPITALS))),
        f"What does {draw.choice(NAMES)} like?",
        "Write these words as a list.",
    ]
    return draw.choice(questions)


def _reading_row(draw: random.Random) -> Record:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    return {
        "instruction": f"What does {name} like?",
        "context": f"{name} likes {thing}.",
        "response": f"It is {thing} that {name} likes.",
        "category": "closed_qa",
    }


def _rewriting_row(draw: random.Random) -> Record:
    words = draw.sample(THINGS, 3)
    row = {
        "instruction": "Write these words as a list.",
        "input": " ".join(words),
        "output": "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1)),
    }
    return row | {"text": "\n\n".join(row.values())}


def _knowing_tree(draw: random.Random, tree: int) -> list[Record]:
    """A question with its best answer, and what the preparation must leave out: a second answer, a deleted one."""
    country = draw.choice(list(CAPITALS))
    prompt = draw.choice(CAPITAL_QUESTIONS).format(country)
    answer = f"The capital of {country} is {CAPITALS[country]}."
    return [
        _message(f"{tree}-question", None, "prompter", prompt, None),
        _message(f"{tree}-best", f"{tree}-question", "assistant", answer, 0.0),
        _message(f"{tree}-second", f"{tree}-question", "assistant", "I forgot.", 1.0),
        _message(f"{tree}-deleted", f"{tree}-question", "assistant", "Which city?", 0.0) | {"deleted": True},
    ]


def _message(message_id: str, parent_id: str | None, role: str, text: str, rank: float | None) -> Record:
    return {
        "message_id": message_id, "parent_id": parent_id, "text": text, "role": role,
        "lang": "en", "rank": rank, "deleted": False, "synthetic": True,
    }  # fmt: skip


def _write_parquet(file: Path, rows: list[Record]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
