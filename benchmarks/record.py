"""One line of JSON a run of a benchmark: when, of which commit, by which command, on what, what it gave.

The lines live in ``benchmarks/records/<benchmark>.jsonl`` and are committed; README quotes nothing else
(``python -m benchmarks.figures`` prints its table from them).
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("nvflare", "torch", "transformers", "trl", "peft", "safetensors")
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES")


def record(benchmark: str, rows: Iterable[Mapping[str, Any]], **conditions: Any) -> Path:
    """Append one run to the benchmark's records.

    Args:
        benchmark: name of the program under ``benchmarks/``, or of one of its tables.
        rows: what it measured, a row a case; units in the names (``wall_s``, ``server_bytes``).
        conditions: what else a reader must know: sizes, seeds, device, what ran beside it.

    Returns:
        The file.
    """
    line = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}".rstrip(),
        "machine": machine(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        **conditions,
        "rows": [dict(row) for row in rows],
    }
    RECORDS.mkdir(exist_ok=True)
    file = RECORDS / f"{benchmark}.jsonl"
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
    return file


def records(benchmark: str) -> list[dict[str, Any]]:
    """All recorded runs of a benchmark, the oldest first."""
    file = RECORDS / f"{benchmark}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def machine() -> dict[str, Any]:
    """The machine in words and numbers, without its name."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    load = round(os.getloadavg()[0], 1)
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "load_at_end": load,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=RECORDS.parent, capture_output=True, text=True)
    return done.stdout.strip()
