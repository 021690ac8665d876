"""A site's clock jumps by a day, on or back; its monotonic clock goes on, as when somebody sets the time."""

import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from tests.integration.cells import VICTIM, federation, finished, quorum_job
from tests.integration.deployment import Poc
from tests.integration.faults import kill, start
from tests.integration.stages import Stage, each

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3000)]
DAY_S = 86400


@pytest.fixture(scope="module")
def offset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the site's clock is ahead."""
    file = tmp_path_factory.mktemp("clock") / "offset"
    file.write_text("+0")
    return file


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory, offset: Path) -> Iterator[Poc]:
    variables = faked_clock(offset)
    with federation(tmp_path_factory.mktemp("clocks")) as poc:
        kill(poc, VICTIM)
        start(poc, VICTIM, variables)
        yield poc


@each()
def test_a_sites_clock_jumps(stage: Stage, poc: Poc, offset: Path, tmp_path: Path):
    # A library between a process and its clock slows it down: that is not the fault.
    began, job_id = time.monotonic(), poc.submit(quorum_job(tmp_path, grace_s=300))
    stage(poc, job_id)
    before = int(offset.read_text())
    after = 0 if before else DAY_S
    (tmp_path / "next").write_text(f"{after:+d}")
    (tmp_path / "next").replace(offset)  # at no moment is it empty
    rounds = finished(poc, job_id, tmp_path, began, f"site's clock jumps by a day, {stage.__name__}")
    assert not any(r["missing"] for r in rounds)
    lines = (poc.run_dir(VICTIM, job_id) / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]
    jump_s = after - before
    assert any(abs(b - a - jump_s) < 3600 for a, b in pairwise(times)), "the site saw it"


def faked_clock(offset: Path) -> dict[str, str]:
    """Variables of processes whose clock is as far from the machine's as a file says (libfaketime)."""
    spec = find_spec("libfaketime")
    if spec is None or spec.origin is None:
        pytest.skip("needs `pip install libfaketime`; Debian's breaks time.sleep of Python 3.11")
    library = str(Path(spec.origin).with_name("vendor") / "libfaketime/src/libfaketime.so.1")
    return {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
