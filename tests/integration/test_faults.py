"""Four sites in the field: one is killed, hangs, is cut off for a moment, in each stage. The job goes on.

Each test is a cell of the fault matrix and prints what happened, what was lost and how long it took.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cells import ROUNDS, VICTIM, federation, finished, in_training, quorum_job, rounds_in
from tests.integration.deployment import Poc, wait_for
from tests.integration.faults import kill, start, suspended
from tests.integration.stages import Stage, each, last_evaluation

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poc]:
    with federation(tmp_path_factory.mktemp("field")) as poc:
        yield poc


def test_nothing_happens(poc: Poc, tmp_path: Path):
    began = time.monotonic()
    rounds = finished(poc, poc.submit(quorum_job(tmp_path)), tmp_path, began, "line of 10 Mbit/s")
    assert not any(r["missing"] for r in rounds)


@each()
def test_a_sites_machine_dies(stage: Stage, poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(quorum_job(tmp_path))
    stage(poc, job_id)
    kill(poc, VICTIM)
    try:
        rounds = finished(poc, job_id, tmp_path, began, f"site's machine dead, {stage.__name__}")
    finally:
        start(poc, VICTIM)
    assert stage is last_evaluation or VICTIM in rounds[-1]["missing"]


@each()
def test_a_sites_job_process_dies_alone(stage: Stage, poc: Poc, tmp_path: Path):
    """Out of memory, say. FLARE's server would end the job for all, were it not for `QuorumMember`."""
    began, job_id = time.monotonic(), poc.submit(quorum_job(tmp_path))
    stage(poc, job_id)
    poc.worker(VICTIM, job_id).kill()
    rounds = finished(poc, job_id, tmp_path, began, f"site's job process killed, {stage.__name__}")
    assert stage is last_evaluation or VICTIM in rounds[-1]["missing"]


@each()
def test_a_site_hangs(stage: Stage, poc: Poc, tmp_path: Path):
    """All its processes, to the end of the job."""
    began, job_id = time.monotonic(), poc.submit(quorum_job(tmp_path))
    stage(poc, job_id)
    with suspended(poc, VICTIM):
        rounds = finished(poc, job_id, tmp_path, began, f"site hung, {stage.__name__}")
    wait_for(lambda: not poc.processes("worker_process", job_id))
    assert stage is last_evaluation or VICTIM in rounds[-1]["missing"]


def test_a_site_hangs_until_its_round_is_over(poc: Poc, tmp_path: Path):
    """What it trained for the round that is over does not count, and it takes up the one that stands."""
    began, job_id = time.monotonic(), poc.submit(quorum_job(tmp_path))
    wait_for(in_training(poc, job_id))
    with suspended(poc, VICTIM):
        wait_for(lambda: len(rounds_in(poc.run_dir("server", job_id))) > 1)
    rounds = finished(poc, job_id, tmp_path, began, "site hung in training until its round is over")
    assert [r["missing"] for r in rounds] == [[], [VICTIM], []]


@pytest.mark.parametrize("reset", [False, True], ids=["stalled", "connections_lost"])
def test_a_line_is_cut_for_a_moment(reset: bool, poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(quorum_job(tmp_path))
    wait_for(in_training(poc, job_id))
    poc.lines[VICTIM].cut()
    time.sleep(30)
    poc.lines[VICTIM].mend(reset=reset)
    rounds = finished(poc, job_id, tmp_path, began, f"line cut for 30 s in training, reset={reset}")
    assert len(rounds) == ROUNDS
