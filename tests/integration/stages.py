"""The five stages of a job in which a fault can come; each waits until the first site is in it."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.cells import ROUNDS, VICTIM, in_training
from tests.integration.deployment import Poc, records, wait_for

UNDER_WAY_BYTES = 1_000_000
"""Of 4 MB a message."""
Stage = Callable[[Poc, str], None]


def download(poc: Poc, job_id: str) -> None:
    """A good part of the second round's model is there."""
    _passes(poc, job_id, report=0, is_back=True)


def training(poc: Poc, job_id: str) -> None:
    wait_for(in_training(poc, job_id))


def upload(poc: Poc, job_id: str) -> None:
    """A good part of the second round's result has left."""
    _passes(poc, job_id, report=1, is_back=False)


def between_rounds(poc: Poc, job_id: str) -> None:
    """The second round's result has arrived, and another site still trains."""
    ledger = poc.run_dir("server", job_id) / "traffic.jsonl"

    def has_arrived() -> bool:
        lines = ledger.read_text().splitlines() if ledger.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        wanted = {"peer": VICTIM, "task": "train", "round": 1, "direction": "in"}
        return any(wanted.items() <= entry.items() for entry in entries)

    wait_for(has_arrived)


def last_evaluation(poc: Poc, job_id: str) -> None:
    """A good part of the last model is there, which is to be evaluated."""
    _passes(poc, job_id, report=ROUNDS - 1, is_back=True)


def _passes(poc: Poc, job_id: str, report: int, is_back: bool) -> None:
    """Wait until the site has trained a round, and a good part of a message has passed after that."""

    def passed() -> int:
        line = poc.lines[VICTIM]
        return line.num_bytes_back if is_back else line.num_bytes - line.num_bytes_back

    wait_for(lambda: any(r["round"] == report for r in records(poc.run_dir(VICTIM, job_id), "round")))
    before = passed()
    wait_for(lambda: passed() > before + UNDER_WAY_BYTES)


def each(*left_out: Stage) -> Any:
    """A test for each stage."""
    stages = [download, training, upload, between_rounds, last_evaluation]
    params = [pytest.param(stage, id=stage.__name__) for stage in stages if stage not in left_out]
    return pytest.mark.parametrize("stage", params)
