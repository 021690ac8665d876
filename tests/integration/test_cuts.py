"""A cut of six minutes in a line of 10 Mbit/s, in each stage: the round waits, and no work is lost.

The grace is longer than the cut; where it is shorter, see ``test_long_job.py``.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cells import NOTHING, VICTIM, federation, finished, lost_of, quorum_job
from tests.integration.deployment import Poc, records
from tests.integration.stages import Stage, each

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3000)]
CUT_S, GRACE_S = 360, 600


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poc]:
    with federation(tmp_path_factory.mktemp("cuts")) as poc:
        yield poc


@each()
def test_a_line_is_cut_for_six_minutes(stage: Stage, poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(quorum_job(tmp_path, grace_s=GRACE_S))
    stage(poc, job_id)
    poc.lines[VICTIM].cut()
    time.sleep(CUT_S)
    poc.lines[VICTIM].mend()
    what = f"line of 10 Mbit/s cut for {CUT_S} s, {stage.__name__}"
    finished(poc, job_id, tmp_path, began, what, seconds=900)
    assert lost_of(tmp_path / job_id) == NOTHING
    reports = [r["round"] for r in records(poc.run_dir(VICTIM, job_id), "round")]
    assert len(reports) == len(set(reports)), "no round is trained twice"
