"""Finds and reads what a run left: the records of its sites."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


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
        return [record for record in read_lines(self.folder / "metrics.jsonl") if record["kind"] == kind]

    def message_bytes(self) -> int | None:
        """Size in bytes of the last training result this site sent, or None if none was recorded."""
        sent = [
            record["bytes_after"]
            for record in read_lines(self.folder / "traffic.jsonl")
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
        return [SiteRun(path.name, path)]
    files = sorted(path.glob("*/simulate_job/metrics.jsonl"))
    if not files:
        raise ValueError(
            f"{path}: expected metrics.jsonl, or a simulator workspace with */simulate_job/metrics.jsonl. "
            "Found neither."
        )
    return [SiteRun(f"{path.name} {file.parents[1].name}", file.parent) for file in files]


def read_lines(file: Path) -> list[Record]:
    """Records of a JSON-lines file that may still be written: an unfinished last line is left out.

    Args:
        file: the file; one that is missing has no records yet.

    Returns:
        The records.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
