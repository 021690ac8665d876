"""The fault matrix in deployed federations: what happened, what was lost, how long it took, as a record.

Usage: ``python -m benchmarks.faults [pytest's options, such as -k hangs]``. About two hours for all of it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import record

TESTS = [
    f"tests/integration/test_{name}.py" for name in ("faults", "full_disks", "cuts", "long_job", "launch")
]


def main() -> int:
    """Run the tests, record the cells that they tell of, and return pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        cells = Path(folder) / "cells.jsonl"
        cells.touch()
        variables = os.environ | {"NVFLARE_LLM_CELLS": str(cells)}
        command = [sys.executable, "-m", "pytest", "-s", "-m", "slow", *TESTS, *sys.argv[1:]]
        code = subprocess.run(command, env=variables, check=False).returncode
        rows = [json.loads(line) for line in cells.read_text().splitlines()]
    if rows:
        print(record("faults", rows, sites="2 or 3, on one machine, with a tiny model"))
    return code


if __name__ == "__main__":
    sys.exit(main())
