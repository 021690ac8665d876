"""A job of many rounds in the field: a line that is cut for six minutes, and a site that fails in each round.

Goodput is the training that the federation had to wait for, over the wall: of each round the longest
training among the sites whose results counted; from the first round's start to the last one's saved model.
"""

import time
from collections.abc import Iterator
from functools import partial
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
    missing_in,
    quorum_job,
    rounds_in,
    rounds_of,
)
from tests.integration.deployment import Poc, deployed, records, tell_cell, wait_for
from tests.integration.simulator import variables_of
from tests.tiny import write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]
NUM_ROUNDS, CUT_ROUND, CUT_S = 20, 6, 360
GOODPUT_STEPS = 2400  # a hundred seconds, beside which what a round costs is small
LOGGING_STEPS = 1  # the densest curve that a job can ask for
GRACE_S = 45
"""13 rounds of it are longer than the cut, so that the site finds the job still there."""


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Poc]:
    folder = tmp_path_factory.mktemp("long")
    data = write_site_data(folder / "data", SITES, num_rows=40)
    with deployed(folder, SITES, variables_of(model, data) | QUICK_ENDS, dict.fromkeys(SITES)) as poc:
        yield poc


def goodput(poc: Poc, job_id: str, rounds: list[dict[str, Any]]) -> float:
    trained = {
        (site, report["round"]): report["train_seconds"]
        for site in SITES
        for report in records(poc.run_dir(site, job_id), "round")
    }
    useful = sum(max(trained[site, each["round"]] for site in each["sites"]) for each in rounds)
    wall: float = rounds[-1]["time"] - rounds[0]["time"] + rounds[0]["seconds"]
    return round(useful / wall, 3)


def test_twenty_rounds_with_a_line_that_is_cut_for_six_minutes_in_the_seventh(poc: Poc, tmp_path: Path):
    began = time.monotonic()
    job_id = poc.submit(quorum_job(tmp_path, rounds=NUM_ROUNDS, grace_s=GRACE_S, local_epochs=2))
    wait_for(in_training(poc, job_id, CUT_ROUND), seconds=900)
    poc.lines[VICTIM].cut()
    time.sleep(CUT_S)
    poc.lines[VICTIM].mend()
    rounds = rounds_of(completed(poc, job_id, tmp_path, NUM_ROUNDS, seconds=1500))
    missing = missing_in(rounds)
    reports = records(poc.run_dir(VICTIM, job_id), "round")
    tell_cell(
        f"20 rounds, line of one of four sites cut for {CUT_S} s in round 7",
        f"completed, {len(rounds)} of {NUM_ROUNDS} rounds; {len(rounds[-1]['sites'])} sites in the last",
        lost_in(rounds),
        time.monotonic() - began,
        missed_rounds=[r["missed_rounds"] for r in reports if r["missed_rounds"]],
        undisturbed_round_s=round(sum(r["seconds"] for r in rounds[1:CUT_ROUND]) / (CUT_ROUND - 1), 1),
    )
    assert missing
    assert all(sites == [VICTIM] for sites in missing.values())
    assert not rounds[-1]["missing"], "the site has come back"
    assert sum(r["missed_rounds"] for r in reports), "and says what it missed"


def test_goodput_with_one_site_that_fails_in_each_round(poc: Poc, tmp_path: Path):
    """The sites' lines are cut in turn, each until its round is averaged without it."""
    began, num_rounds = time.monotonic(), len(SITES)
    job = quorum_job(
        tmp_path,
        rounds=num_rounds,
        grace_s=3,
        quorum=len(SITES) // 2,
        local_epochs=None,
        local_steps=GOODPUT_STEPS,
        logging_steps=LOGGING_STEPS,
    )
    job_id = poc.submit(job)

    def has_averaged(number: int) -> bool:
        return len(rounds_in(poc.run_dir("server", job_id))) > number

    for number in range(num_rounds):
        site = SITES[number % len(SITES)]
        wait_for(in_training(poc, job_id, number, site), seconds=600)
        poc.lines[site].cut()
        wait_for(partial(has_averaged, number), seconds=600)
        poc.lines[site].mend()
    rounds = rounds_of(completed(poc, job_id, tmp_path, num_rounds, quorum=len(SITES) // 2))
    found = goodput(poc, job_id, rounds)
    tell_cell(
        f"one site fails in each round of {GOODPUT_STEPS} steps, logged every {LOGGING_STEPS}",
        f"completed, {len(rounds)} of {num_rounds} rounds",
        lost_in(rounds),
        time.monotonic() - began,
        goodput=found,
        round_s=[round(r["seconds"]) for r in rounds],
    )
    assert len(missing_in(rounds)) >= num_rounds - 1
