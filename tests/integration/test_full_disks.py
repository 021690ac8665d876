"""A disk that is full, at a site or on the server, in each stage; then somebody makes room."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvflare_llm_components.checkpoint.manifest import read_manifest
from tests.integration.cells import (
    NOTHING,
    ROUNDS,
    VICTIM,
    federation,
    finished,
    lost_of,
    quorum_job,
    rounds_in,
    rounds_of,
)
from tests.integration.deployment import Poc, tell_cell, wait_for
from tests.integration.disk import fill, make_room
from tests.integration.stages import Stage, each, last_evaluation
from tests.integration.test_launch import chain, submit, taken

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3000)]
DISK_MB = 256


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poc]:
    disks = dict.fromkeys((VICTIM, "server"), DISK_MB)
    with federation(tmp_path_factory.mktemp("full"), disks=disks) as poc:
        yield poc


@each()
def test_a_sites_disk_is_full_until_the_round_is_over(stage: Stage, poc: Poc, tmp_path: Path):
    began, job_id = time.monotonic(), poc.submit(quorum_job(tmp_path))
    stage(poc, job_id)
    fill(poc.kit(VICTIM))
    try:
        if stage is last_evaluation:
            poc.ending(job_id)
        else:
            wait_for(lambda: len(rounds_in(poc.run_dir("server", job_id))) > 1)
    finally:
        make_room(poc.kit(VICTIM))
    rounds = finished(poc, job_id, tmp_path, began, f"site's disk full, {stage.__name__}")
    assert not rounds[-1]["missing"], "the site is back"


@each()
def test_the_servers_disk_is_full(stage: Stage, poc: Poc, tmp_path: Path):
    """Room is made when the job has ended, and the same command is given again where it gave up."""
    out, began = tmp_path / "out", time.monotonic()
    copied = quorum_job(tmp_path)
    with submit(poc, copied, out) as launcher:
        stage(poc, taken(out))
        fill(poc.kit("server"))
        try:
            wait_for(lambda: chain(out)[0]["ending"], seconds=300)
        finally:
            make_room(poc.kit("server"))
        output, _ = launcher.communicate(timeout=600)
    calls = 1
    if launcher.returncode:
        calls = 2
        with submit(poc, copied, out) as launcher:
            again, _ = launcher.communicate(timeout=600)
        output += again
    print(output)
    assert launcher.returncode == 0, output
    runs = chain(out)
    left = out / runs[-1]["job_id"]
    rounds = rounds_of(left)
    begun = f"round {rounds[0]['round'] + 1}, trained again" if rounds else "the evaluation, done again"
    again = [begun] if len(runs) > 1 else []
    tell_cell(
        f"server's disk full, {stage.__name__}",
        f"{', then '.join(run['ending'] for run in runs)} by {calls} call{'s' * (calls > 1)} of the command",
        "; ".join(again + [each for each in [lost_of(left)] if each != NOTHING]) or NOTHING,
        time.monotonic() - began,
    )
    assert read_manifest(left / "workspace" / "global_model" / "last")["round"] == ROUNDS - 1
