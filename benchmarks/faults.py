"""The fault matrix in deployed federations: what happened, what was lost, how long it took, as a record.

python -m benchmarks.faults [options of pytest, such as -k hangs]    run the cells; about two hours for all
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
    f"tests/integration/test_{name}.py" for name in ("faults", "full_disks", "cuts", "long_job", "launch")
]
MANUAL = Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN, END = "<!-- python -m benchmarks.faults --write -->", "<!-- end of the fault matrix -->"
COLUMNS = ("what", "outcome", "lost", "seconds")


def table() -> str:
    """The last row of each cell, in Markdown."""
    runs = records("faults")
    rows: dict[str, dict[str, Any]] = {row["what"]: row for run in runs for row in run["rows"]}
    lines = ["| fault, stage | what happened | what was lost | seconds |", "|---|---|---|---|"]
    for _, row in sorted(rows.items()):
        facts = [f"{name} {row[name]}" for name in row if name not in COLUMNS]
        outcome = "; ".join([row["outcome"], *facts])
        lines.append(f"| {row['what']} | {outcome} | {row['lost']} | {row['seconds']} |")
    commits = ", ".join(dict.fromkeys(run["commit"][:7] for run in runs))
    return "\n".join([*lines, "", f"From `benchmarks/records/faults.jsonl`, commits {commits}."])


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
        print(record("faults", rows, sites="2 or 3, on one machine, with a tiny model"))
    return code


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        MANUAL.write_text(written(MANUAL.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.exit(run(sys.argv[1:]))
