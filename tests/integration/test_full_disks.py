"""A disk that is full: at a site while it trains, on the server while it saves; then somebody makes room."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cells import (
    QUICK_ENDS,
    SITES,
    VICTIM,
    finished,
    in_training,
    lost_in,
    quorum_job,
    rounds_in,
    rounds_of,
)
from tests.integration.deployment import Poc, deployed, tell_cell, wait_for
from tests.integration.disk import fill, make_room
from tests.integration.simulator import variables_of
from tests.integration.test_launch import chain, submit, taken
from tests.tiny import write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]
ROUNDS = 4
DISK_MB = 24


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Poc]:
    folder = tmp_path_factory.mktemp("full")
    data = write_site_data(folder / "data", SITES, num_rows=200)
    disks = dict.fromkeys((VICTIM, "server"), DISK_MB)
    with deployed(folder, SITES, variables_of(model, data) | QUICK_ENDS, disks=disks) as poc:
        yield poc


def job(folder: Path) -> Path:
    return quorum_job(folder, rounds=ROUNDS, grace_s=20, evaluation_s=60, local_epochs=2)


def test_a_sites_disk_is_full_while_it_trains(poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(job(tmp_path))
    wait_for(in_training(poc, job_id))
    fill(poc.kit(VICTIM))
    wait_for(lambda: len(rounds_in(poc.run_dir("server", job_id))) > 1)
    make_room(poc.kit(VICTIM))
    rounds = finished(
        poc, job_id, tmp_path, began, "site's disk full, in_training, until the round is over", ROUNDS
    )
    assert not rounds[-1]["missing"], "the site is back"


def test_the_servers_disk_is_full_when_it_saves(poc: Poc, tmp_path: Path):
    """Room is made when the job has ended, and the same command is given again where it gave up."""
    out, began = tmp_path / "out", time.monotonic()
    copied = job(tmp_path)
    with submit(poc, copied, out) as launcher:
        job_id = taken(out)
        wait_for(in_training(poc, job_id))
        fill(poc.kit("server"))
        wait_for(lambda: chain(out)[0]["ending"], seconds=300)
        make_room(poc.kit("server"))
        output, _ = launcher.communicate(timeout=400)
    calls = 1
    if launcher.returncode:
        calls = 2
        with submit(poc, copied, out) as launcher:
            again, _ = launcher.communicate(timeout=400)
        output += again
    print(output)
    assert launcher.returncode == 0, output
    runs = chain(out)
    rounds = rounds_of(out / runs[-1]["job_id"])
    tell_cell(
        "server's disk full when round 2 is saved, `nvflare-llm submit`",
        f"{runs[0]['ending']}, then {runs[-1]['ending']} by {calls} call{'s' * (calls > 1)} of the command",
        f"round {rounds[0]['round'] + 1} is trained again; {lost_in(rounds)}",
        time.monotonic() - began,
    )
    assert rounds[-1]["round"] == ROUNDS - 1
