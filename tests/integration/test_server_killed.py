"""The server of four sites is killed in each stage: the job goes on by itself, or by hand."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvflare_llm_components.tools.resume import resume_job
from tests.integration.cells import (
    NOTHING,
    ROUNDS,
    SITES,
    federation,
    in_training,
    lost_of,
    quorum_job,
    rounds_of,
)
from tests.integration.deployment import Poc, tell_cell, wait_for
from tests.integration.faults import kill
from tests.integration.simulator import edit
from tests.integration.stages import Stage, each
from tests.integration.test_launch import chain, submit, taken

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poc]:
    with federation(tmp_path_factory.mktemp("killed")) as poc:
        yield poc


def job(folder: Path) -> Path:
    copied = quorum_job(folder)
    edit(copied / "meta.json", lambda meta: meta.update(min_clients=len(SITES)))
    return copied


def sites_that_go_on(poc: Poc, job_id: str) -> list[str]:
    """Those whose trainer has kept what it was, optimizer and schedule."""
    return [site for site in SITES if "trainer_state continues from" in poc.log(site, job_id)]


@each()
def test_the_job_goes_on_by_itself(stage: Stage, poc: Poc, tmp_path: Path):
    out, began = tmp_path / "out", time.monotonic()
    with submit(poc, job(tmp_path), out) as launcher:
        stage(poc, taken(out))
        kill(poc, "server")
        poc.cli(
            "poc", "start", "-p", "server", "--no-wait"
        )  # the kit's own daemon gives up at the fifth kill in a row
        output, _ = launcher.communicate(timeout=1500)
    print(output)
    assert launcher.returncode == 0, output
    runs = chain(out)
    told = [r["round"] for r in rounds_of(out / runs[-1]["job_id"])]
    saved = runs[0]["saved_round"]
    lost = [f"round {saved + 2}, trained again" if saved < ROUNDS - 1 else "the evaluation, done again"]
    lost += [each for each in [lost_of(out / runs[-1]["job_id"])] if each != NOTHING]
    kept = sites_that_go_on(poc, runs[-1]["job_id"])
    tell_cell(
        f"server killed, {stage.__name__}",
        f"completed by itself; {len(kept)} of {len(SITES)} sites go on with their state",
        "; ".join(lost),
        time.monotonic() - began,
    )
    assert [run["ending"] for run in runs] == ["server restarted", "FINISHED:COMPLETED"]
    assert told == list(range(saved + 1, ROUNDS))
    assert kept == SITES


def test_it_is_continued_by_hand(poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(job(tmp_path))
    wait_for(in_training(poc, job_id))
    kill(poc, "server")
    dead = poc.run_dir("server", job_id)
    assert dead.is_dir(), "a killed server leaves its run directory"
    print(resume_job(dead, tmp_path / "resumed"))
    poc.cli("poc", "start", "-p", "server", "--no-wait")
    resumed = wait_for(lambda: submitted(poc, tmp_path / "resumed"))
    assert poc.ending(resumed, seconds=1500) == "FINISHED:COMPLETED"
    download = poc.download(resumed, tmp_path)
    told = [r["round"] for r in rounds_of(download)]
    record = json.loads((download / "workspace/global_model/last/federation.json").read_text())
    kept = sites_that_go_on(poc, resumed)
    tell_cell(
        "server killed in training, `nvflare-llm resume`",
        f"completed; {len(kept)} of {len(SITES)} sites go on with their state",
        "round 2, trained again",
        time.monotonic() - began,
    )
    assert told == list(range(1, ROUNDS))
    assert [entry["job_id"] for entry in record["rounds"]] == [job_id, resumed]
    assert kept == SITES


def submitted(poc: Poc, job: Path) -> str | None:
    try:
        return poc.submit(job)
    except AssertionError:  # the server is not up yet
        return None
