"""The fault matrix in deployed federations: what happened, what was lost, how long it took, as a record.

python -m benchmarks.faults [options of pytest, such as -k hangs]    run the cells; about four hours for all
python -m benchmarks.faults --write                                  put the table into docs/operations.md
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import record, records

TESTS = [
    f"tests/integration/test_{name}.py"
    for name in ("faults", "server_killed", "full_disks", "cuts", "clocks", "long_job", "launch")
]
MANUAL = Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN, END = "<!-- python -m benchmarks.faults --write -->", "<!-- end of the fault matrix -->"
FOUR_SITES = "4, on one machine, with a tiny model; test_launch: 2"
STAGES = ("download", "training", "upload", "between_rounds", "last_evaluation")
COLUMNS = ("what", "outcome", "lost", "seconds")


def table() -> str:
    """The last row of each cell, in Markdown: the matrix, and what is no cell of it."""
    runs = [run for run in records("faults") if run["sites"] == FOUR_SITES]
    rows: dict[str, dict[str, Any]] = {row["what"]: row for run in runs for row in run["rows"]}
    faults = sorted({what.rpartition(", ")[0] for what in rows if what.endswith(STAGES)})
    lines = [f"| fault | {' | '.join(stage.replace('_', ' ') for stage in STAGES)} |", "|---" * 6 + "|"]
    for fault in faults:
        cells = [rows.pop(f"{fault}, {stage}", None) for stage in STAGES]
        lines.append(f"| {fault} | {' | '.join(map(cell, cells))} |")
    if rows:
        lines += ["", "| fault | what happened | what was lost | seconds |", "|---|---|---|---|"]
    for _, row in sorted(rows.items()):
        lines.append(f"| {row['what']} | {outcome_of(row)} | {row['lost']} | {row['seconds']} |")
    commits = ", ".join(dict.fromkeys(run["commit"][:7] for run in runs))
    return "\n".join([*lines, "", f"From `benchmarks/records/faults.jsonl`, commits {commits}."])


def outcome_of(row: dict[str, Any]) -> str:
    facts = [f"{name} {row[name]}" for name in row if name not in COLUMNS]
    return "; ".join([row["outcome"], *facts])


def cell(row: dict[str, Any] | None) -> str:
    """What was lost, and what else there is to say than that all rounds were completed."""
    if row is None:
        return "not run"
    told = "" if row["outcome"].startswith("completed, ") else f"{row['outcome']}: "
    twice = ", trained twice" if row.get("rounds_trained_twice") else ""
    return f"{told}{row['lost']}{twice}; {row['seconds']} s"


def written(manual: str) -> str:
    """The manual's text with the table of today's records between its two marks."""
    head, rest = manual.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def run(options: list[str]) -> int:
    """Run the cells, record what they tell, and return pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        cells = Path(folder) / "cells.jsonl"
        cells.touch()
        variables = os.environ | {"NVFLARE_LLM_CELLS": str(cells)}
        command = [sys.executable, "-m", "pytest", "-s", "-m", "slow", *TESTS, *options]
        code = subprocess.run(command, env=variables, check=False).returncode
        rows = [json.loads(line) for line in cells.read_text().splitlines()]
    if rows:
        print(record("faults", rows, sites=FOUR_SITES))
    return code


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        MANUAL.write_text(written(MANUAL.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.exit(run(sys.argv[1:]))
