"""Finds and reads what a run left: the records of its sites."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_llm_components.tensors.text import printable

Record = dict[str, Any]

_WHOLE = (
    *("round", "num_rounds", "step", "num_steps", "start_step", "end_step"),
    *("num_examples", "num_tokens", "missed_rounds"),
    *("bytes_out", "bytes_in", "bytes_before", "bytes_after", "num_saturated", "num_nonfinite"),
)
_REAL = (
    *("seconds", "train_seconds", "task_seconds", "epoch", "learning_rate", "relative_error"),
    *("loss", "eval_loss", "train_loss"),
)
_WORDS = ["kind", "operation", "task", "direction", "site", "peer"]
_NEEDED = {"train": ("step",), "eval": ("step",), "round": ("round", "start_step", "end_step")}
_LARGEST = 2**63


@dataclass(frozen=True)
class SiteRun:
    """One site's part of a run, or a baseline.

    Attributes:
        label: for people; unique among the runs found together.
        folder: holds ``metrics.jsonl``, and ``traffic.jsonl`` where messages went through the filters.
    """

    label: str
    folder: Path

    def metrics(self, kind: str) -> list[Record]:
        """Records of one kind (``train``, ``eval`` or ``round``), in the order they were written."""
        records = of_kind(read_lines(self.folder / "metrics.jsonl"), kind)
        return having(records, *_NEEDED[kind])

    def message_bytes(self) -> int | None:
        """Size in bytes of the last training result this site sent, or None if none was recorded."""
        sent = [
            record["bytes_after"]
            for record in having(
                read_lines(self.folder / "traffic.jsonl"), "operation", "task", "bytes_after"
            )
            if record["operation"] == "quantize" and record["task"] == "train"
        ]
        return sent[-1] if sent else None


def find_runs(path: Path) -> list[SiteRun]:
    """Finds the runs below a folder.

    Args:
        path: a folder with ``metrics.jsonl`` (a baseline, a site's run directory), or a simulator workspace.

    Returns:
        One entry for each site, by name.

    Raises:
        ValueError: there is none.
    """
    if (path / "metrics.jsonl").is_file():
        return [SiteRun(printable(path.name, 200), path)]
    files = sorted(path.glob("*/simulate_job/metrics.jsonl"))
    if not files:
        raise ValueError(
            f"{path}: expected metrics.jsonl, or a simulator workspace with */simulate_job/metrics.jsonl. "
            "Found neither."
        )
    return [SiteRun(printable(f"{path.name} {file.parents[1].name}", 200), file.parent) for file in files]


def read_lines(file: Path) -> list[Record]:
    """Records of a JSON-lines file that may still be written, and may come from elsewhere.

    Args:
        file: the file; one that is missing has no records yet.

    Returns:
        Its records as :func:`plain` leaves them. A line that is not finished, or no record, is left out.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [record for line in lines if line.endswith("\n") and (record := _parsed(line))]


def _parsed(line: str) -> Record:
    try:
        return plain(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def plain(content: object) -> Record:
    """What is known of a record: numbers of the right kind, words and names that print; the rest is left out.

    A terminal obeys what is written to it, and a run's folder may be anybody's.
    """
    if not isinstance(content, dict):
        return {}
    numbers = {key: content[key] for key in _WHOLE if _is_whole(content.get(key))}
    numbers |= {key: content[key] for key in _REAL if _is_real(content.get(key))}
    words = {key: printable(content[key], 200) for key in _WORDS if isinstance(content.get(key), str)}
    missing = content.get("missing")
    if isinstance(missing, list):
        return numbers | words | {"missing": [printable(site, 200) for site in missing]}
    return numbers | words


def _is_whole(value: object) -> bool:
    return type(value) is int and abs(value) < _LARGEST


def _is_real(value: object) -> bool:
    return type(value) is float or _is_whole(value)


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """Records of one kind."""
    return [record for record in records if record.get("kind") == kind]


def having(records: Iterable[Record], *keys: str) -> list[Record]:
    """Records that have all of some keys."""
    return [record for record in records if record.keys() >= set(keys)]
