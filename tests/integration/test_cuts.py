"""A line of 10 Mbit/s, and a cut of six minutes in each stage: the round waits, and no work is lost.

The grace is longer than the cut; where it is shorter, see ``test_long_job.py``.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cells import (
    QUICK_ENDS,
    SITES,
    VICTIM,
    completed,
    in_training,
    lost_in,
    quorum_job,
    rounds_of,
)
from tests.integration.deployment import Poc, deployed, records, tell_cell, wait_for
from tests.integration.simulator import variables_of
from tests.tiny import save_tiny_model, write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]
ROUNDS, CUT_S, GRACE_S = 3, 360, 600
LINE_BITS_PER_S = 10e6
SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
UNDER_WAY_BYTES = 3_000_000
"""Of 12 MB a message."""


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poc]:
    folder = tmp_path_factory.mktemp("cuts")
    model = save_tiny_model(folder / "model", **SHAPE)
    data = write_site_data(folder / "data", SITES, num_rows=40)
    write_site_data(folder / "data", SITES[2:], num_rows=320)  # the others wait for this one between rounds
    variables = variables_of(model, data) | QUICK_ENDS
    with deployed(folder, SITES, variables, {VICTIM: LINE_BITS_PER_S}) as poc:
        yield poc


def passes(poc: Poc, job_id: str, report: int, is_back: bool) -> None:
    """Wait until the victim has trained a round, and a good part of a message has passed after that."""

    def passed() -> int:
        line = poc.lines[VICTIM]
        return line.num_bytes_back if is_back else line.num_bytes - line.num_bytes_back

    wait_for(lambda: any(r["round"] == report for r in records(poc.run_dir(VICTIM, job_id), "round")))
    before = passed()
    wait_for(lambda: passed() > before + UNDER_WAY_BYTES)


def download(poc: Poc, job_id: str) -> None:
    passes(poc, job_id, report=0, is_back=True)


def training(poc: Poc, job_id: str) -> None:
    wait_for(in_training(poc, job_id))


def upload(poc: Poc, job_id: str) -> None:
    passes(poc, job_id, report=1, is_back=False)


def between_rounds(poc: Poc, job_id: str) -> None:
    ledger = poc.run_dir("server", job_id) / "traffic.jsonl"

    def has_arrived() -> bool:
        lines = ledger.read_text().splitlines() if ledger.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        wanted = {"peer": VICTIM, "task": "train", "round": 1, "direction": "in"}
        return any(wanted.items() <= entry.items() for entry in entries)

    wait_for(has_arrived)


def last_evaluation(poc: Poc, job_id: str) -> None:
    passes(poc, job_id, report=ROUNDS - 1, is_back=True)


def tell(poc: Poc, job_id: str, folder: Path, began: float, what: str) -> None:
    """Wait for the end; the cell of the matrix."""
    left = completed(poc, job_id, folder, ROUNDS, seconds=900)
    rounds = rounds_of(left)
    evaluated = json.loads((left / "workspace/final_evaluation.json").read_text())["sites"]
    reports = [r["round"] for r in records(poc.run_dir(VICTIM, job_id), "round")]
    again = len(reports) - len(set(reports))
    facts: dict[str, Any] = {"rounds_trained_again": again, "sites_in_last_evaluation": len(evaluated)}
    outcome = f"completed, {len(rounds)} of {ROUNDS} rounds"
    tell_cell(what, outcome, lost_in(rounds), time.monotonic() - began, **facts)
    assert not any(r["missing"] for r in rounds)
    assert sorted(evaluated) == SITES
    assert not again


def job(folder: Path) -> Path:
    return quorum_job(folder, rounds=ROUNDS, grace_s=GRACE_S, local_epochs=1)


def test_a_line_of_10_megabits(poc: Poc, tmp_path: Path):
    began = time.monotonic()
    tell(poc, poc.submit(job(tmp_path)), tmp_path, began, "line of 10 Mbit/s, 12 MB a message")


@pytest.mark.parametrize("stage", [download, training, upload, between_rounds, last_evaluation])
def test_a_line_is_cut_for_six_minutes(stage: Callable[[Poc, str], None], poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(job(tmp_path))
    stage(poc, job_id)
    poc.lines[VICTIM].cut()
    time.sleep(CUT_S)
    poc.lines[VICTIM].mend()
    tell(poc, job_id, tmp_path, began, f"line of 10 Mbit/s cut for {CUT_S} s, {stage.__name__}")
