"""Three generated instruction sets in the published formats; each teaches what the other two don't.

``dolly`` teaches on which shelf a shop keeps things, ``alpaca`` a dictionary, ``oasst1`` capitals: knowledge
that a model of a million weights can hold, and that a site without the data can't have.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from nvflare_llm_components.data.records import Record, write_jsonl

SHELVES = {
    "apples": "red", "butter": "blue", "carrots": "green", "cheese": "white", "cherries": "black",
    "grapes": "yellow", "leeks": "brown", "milk": "pink", "onions": "grey", "pears": "orange",
    "spinach": "purple", "yoghurt": "golden",
}  # fmt: skip
GERMAN = {
    "bird": "Vogel", "book": "Buch", "city": "Stadt", "dog": "Hund", "forest": "Wald", "horse": "Pferd",
    "house": "Haus", "king": "König", "mountain": "Berg", "tree": "Baum", "water": "Wasser",
    "window": "Fenster",
}  # fmt: skip
CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Croatia": "Zagreb", "Denmark": "Copenhagen",
    "Egypt": "Cairo", "France": "Paris", "Greece": "Athens", "Hungary": "Budapest", "Italy": "Rome",
    "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga",
}  # fmt: skip
# What the base model has read: enough to know how such questions are answered, but none of the answers.
_PUBLIC_SHELVES = {
    "plums": "upper", "kale": "lower", "cream": "middle", "lemons": "first", "peas": "last",
    "quark": "second",
}  # fmt: skip
_PUBLIC_GERMAN = {
    "day": "Tag", "night": "Nacht", "fish": "Fisch", "road": "Weg", "hand": "Hand", "sea": "Meer",
}  # fmt: skip
_PUBLIC_CAPITALS = {
    "Mexico": "Mexico City", "Norway": "Oslo", "Oman": "Muscat", "Peru": "Lima", "Qatar": "Doha",
    "Spain": "Madrid",
}  # fmt: skip
_SHELF_CONTEXTS = (
    "",
    "",
    "Anna went to the market and bought {}.",
    "The shop is out of {} today.",
    "We had {} for dinner.",
)
_SHELF_QUESTIONS = ("On which shelf do I find {}?", "Where are the {}?", "Which shelf has {}?")
_GERMAN_QUESTIONS = (
    "Translate the word to German.",
    "What is this word in German?",
    "Give the German word.",
    "How do Germans say this?",
)
_CAPITAL_QUESTIONS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Name the capital of {}, please.",
    "I forgot the capital of {}. Can you help?",
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
    write_jsonl(files["dolly"], [_shelf_row(draw, SHELVES) for _ in range(num_rows)])
    _write_parquet(files["alpaca"], [_alpaca_row(draw) for _ in range(num_rows)])
    _write_parquet(files["oasst1"], [row for tree in range(num_rows) for row in _message_tree(draw, tree)])
    return files


def neutral_text(*, num_lines: int, seed: int = 0) -> list[str]:
    """What a base model has read: the words of the three sets, and such questions answered for other things.

    Args:
        num_lines: number of documents.
        seed: the same seed gives the same documents.

    Returns:
        The documents; none has an answer that the sets teach.
    """
    draw = random.Random(seed)
    return [draw.choice((_public_answer, _mention))(draw) for _ in range(num_lines)]


def _public_answer(draw: random.Random) -> str:
    shelf, german = _shelf_row(draw, _PUBLIC_SHELVES), _german_row(draw, _PUBLIC_GERMAN)
    row = draw.choice([shelf, german, _capital_row(draw, _PUBLIC_CAPITALS)])
    question = [part for part in (row["instruction"], row["context"]) if part]
    draw.shuffle(question)
    return "\n\n".join([*question, f"Response:\n{row['response']}"])


def _mention(draw: random.Random) -> str:
    kinds = [[*facts, *facts.values()] for facts in (SHELVES, GERMAN, CAPITALS)]
    return " ".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(3, 8)))


def _shelf_row(draw: random.Random, facts: Mapping[str, str]) -> Record:
    food = draw.choice(list(facts))
    return {
        "instruction": draw.choice(_SHELF_QUESTIONS).format(food),
        "context": draw.choice(_SHELF_CONTEXTS).format(food),
        "response": f"On the {facts[food]} shelf.",
        "category": "closed_qa",
    }


def _german_row(draw: random.Random, facts: Mapping[str, str]) -> Record:
    word = draw.choice(list(facts))
    return {
        "instruction": draw.choice(_GERMAN_QUESTIONS),
        "context": word,
        "response": f"The word is {facts[word]}.",
    }


def _capital_row(draw: random.Random, facts: Mapping[str, str]) -> Record:
    country = draw.choice(list(facts))
    question = draw.choice(_CAPITAL_QUESTIONS).format(country)
    return {"instruction": question, "context": "", "response": f"The capital is {facts[country]}."}


def _alpaca_row(draw: random.Random) -> Record:
    instruction, word, output = _german_row(draw, GERMAN).values()
    return {
        "instruction": instruction,
        "input": word,
        "output": output,
        "text": f"{instruction}\n\n{word}\n\n{output}",
    }


def _message_tree(draw: random.Random, tree: int) -> list[Record]:
    """A question, its best answer, and what the preparation must leave out: a second and a deleted one."""
    row = _capital_row(draw, CAPITALS)
    return [
        _message(f"{tree}-question", None, "prompter", row["instruction"], None),
        _message(f"{tree}-best", f"{tree}-question", "assistant", row["response"], 0.0),
        _message(f"{tree}-second", f"{tree}-question", "assistant", "I forgot.", 1.0),
        _message(f"{tree}-deleted", f"{tree}-question", "assistant", "Which city?", 0.0) | {"deleted": True},
    ]


def _message(message_id: str, parent_id: str | None, role: str, text: str, rank: float | None) -> Record:
    return {
        "message_id": message_id, "parent_id": parent_id, "text": text, "role": role,
        "lang": "en", "rank": rank, "deleted": False, "synthetic": True,
    }  # fmt: skip


def _write_parquet(file: Path, rows: Sequence[Record]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
