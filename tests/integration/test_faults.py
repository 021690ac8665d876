"""Three sites in the field: one is killed, hangs, is cut off; the server is killed. The job goes on.

Each test is a cell of the fault matrix and prints what happened, what was lost and how long it took.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvflare_llm_components.tools.resume import resume_job
from tests.integration import cells
from tests.integration.cells import QUICK_ENDS, SITES, VICTIM, in_training, quorum_job, rounds_of
from tests.integration.deployment import Poc, deployed, records, tell_cell, wait_for
from tests.integration.simulator import variables_of
from tests.tiny import write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROUNDS = 3
GRACE_S = 20


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Poc]:
    folder = tmp_path_factory.mktemp("field")
    data = write_site_data(folder / "data", SITES, num_rows=200)
    with deployed(folder, SITES, variables_of(model, data) | QUICK_ENDS, {VICTIM: None}) as poc:
        yield poc


def job(folder: Path, grace_s: float = GRACE_S) -> Path:
    return quorum_job(folder, rounds=ROUNDS, grace_s=grace_s, evaluation_s=3 * GRACE_S, local_epochs=2)


def between_rounds(poc: Poc, job_id: str) -> Callable[[], bool]:
    """The victim has sent its result and waits for the others."""
    return lambda: any(r["round"] == 0 for r in records(poc.run_dir(VICTIM, job_id), "round"))


def stages() -> list[Any]:
    return [pytest.param(stage, id=stage.__name__) for stage in (in_training, between_rounds)]


finished = partial(cells.finished, num_rounds=ROUNDS)


def test_nothing_happens(poc: Poc, tmp_path: Path):
    began = time.monotonic()
    rounds = finished(poc, poc.submit(job(tmp_path)), tmp_path, began, "undisturbed")
    assert not any(r["missing"] for r in rounds)


@pytest.mark.parametrize("stage", stages())
def test_a_sites_machine_dies(stage: Callable[..., Any], poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(job(tmp_path))
    wait_for(stage(poc, job_id))
    kill(poc, VICTIM)
    try:
        rounds = finished(poc, job_id, tmp_path, began, f"site's machine dead, {stage.__name__}")
    finally:
        poc.cli("poc", "start", "-p", VICTIM)
    assert VICTIM in rounds[-1]["missing"]


@pytest.mark.parametrize("stage", stages())
def test_a_sites_job_process_dies_alone(stage: Callable[..., Any], poc: Poc, tmp_path: Path):
    """Out of memory, say. FLARE's server would end the job for all, were it not for `QuorumMember`."""
    began, job_id = time.monotonic(), poc.submit(job(tmp_path))
    wait_for(stage(poc, job_id))
    poc.worker(VICTIM, job_id).kill()
    rounds = finished(poc, job_id, tmp_path, began, f"site's job process killed, {stage.__name__}")
    assert VICTIM in rounds[-1]["missing"]


@pytest.mark.parametrize("stage", stages())
def test_a_site_hangs(stage: Callable[..., Any], poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(job(tmp_path))
    wait_for(stage(poc, job_id))
    worker = poc.worker(VICTIM, job_id)
    worker.send_signal(signal.SIGSTOP)
    try:
        rounds = finished(poc, job_id, tmp_path, began, f"site hung, {stage.__name__}")
    finally:
        if worker.is_running():
            worker.kill()
    assert VICTIM in rounds[-1]["missing"]


@pytest.mark.parametrize("reset", [False, True], ids=["stalled", "connections_lost"])
@pytest.mark.parametrize("stage", stages())
def test_a_line_is_cut_and_mended(stage: Callable[..., Any], reset: bool, poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(job(tmp_path))
    wait_for(stage(poc, job_id))
    poc.lines[VICTIM].cut()
    time.sleep(30)  # that long it is cut: longer than a round's grace
    poc.lines[VICTIM].mend(reset=reset)
    finished(poc, job_id, tmp_path, began, f"line cut for 30 s, reset={reset}, {stage.__name__}")


@pytest.mark.parametrize("jump_s", [86400, -86400])
def test_a_sites_clock_jumps(jump_s: int, poc: Poc, tmp_path: Path):
    """By a day; the monotonic clock goes on as it does when a machine's time is set."""
    offset = tmp_path / "offset"
    offset.write_text("+0")
    variables = faked_clock(offset)
    restart(poc, VICTIM, variables)
    try:
        # A library between a process and its clock slows it down: that is not the fault.
        began, job_id = time.monotonic(), poc.submit(job(tmp_path, grace_s=300))
        wait_for(in_training(poc, job_id))
        (tmp_path / "next").write_text(f"{jump_s:+d}")
        (tmp_path / "next").replace(offset)  # at no moment is it empty
        rounds = finished(poc, job_id, tmp_path, began, f"site's clock jumps by {jump_s:+d} s, in_training")
        assert not any(r["missing"] for r in rounds)
        times = [r["time"] for r in records(poc.run_dir(VICTIM, job_id), "round")]
        assert abs(times[-1] - times[0] - jump_s) < 3600, "the site saw the jump"
    finally:
        restart(poc, VICTIM, {})


def test_the_server_is_killed_and_the_job_is_continued(poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(job(tmp_path))
    wait_for(in_training(poc, job_id))
    kill(poc, "server")
    dead = poc.run_dir("server", job_id)
    assert dead.is_dir(), "a killed server leaves its run directory"
    print(resume_job(dead, tmp_path / "resumed"))
    poc.cli("poc", "start", "-p", "server")
    resumed = wait_for(lambda: submitted(poc, tmp_path / "resumed"))
    assert poc.ending(resumed, seconds=400) == "FINISHED:COMPLETED"
    download = poc.download(resumed, tmp_path)
    told = [r["round"] for r in rounds_of(download)]
    assert told == list(range(1, ROUNDS))
    record = json.loads((download / "workspace/global_model/last/federation.json").read_text())
    assert [entry["job_id"] for entry in record["rounds"]] == [job_id, resumed]
    kept = [f"{site}: trainer_state" for site in SITES if "continues from" in poc.log(site, resumed)]
    lost = f"the round that was trained; {len(kept)} of {len(SITES)} sites go on with their state"
    tell_cell("server killed, in_training, resumed by hand", "completed", lost, time.monotonic() - began)
    assert len(kept) == len(SITES)


def kill(poc: Poc, site: str) -> None:
    """All its processes at once, and what would start them again."""
    processes = [psutil.Process(pid) for pid in poc.processes(f"/prod_00/{site}")]
    assert processes
    for process in processes:
        process.suspend()  # else the site's parent process still tells how its job has died
    for process in processes:
        process.kill()
    wait_for(lambda: not poc.processes(f"/prod_00/{site}"))


def restart(poc: Poc, site: str, variables: dict[str, str]) -> None:
    """Kill a site, start it with further variables, and wait until the server has it again."""

    def num_registered() -> int:
        return (poc.kit(site) / "log.txt").read_text().count("Successfully registered client")

    before = num_registered()
    kill(poc, site)
    poc.cli("poc", "start", "-p", site, variables=variables)
    wait_for(lambda: num_registered() > before)


def submitted(poc: Poc, job: Path) -> str | None:
    try:
        return poc.submit(job)
    except AssertionError:  # the server is not up yet
        return None


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
