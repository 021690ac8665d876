"""Two processes a site in a real job: a rank is killed, its site is named and comes back, nothing is left."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.integration.simulator import Run, copy_job, executor_args, simulate
from tests.tiny import write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SITES = ["dolly", "alpaca", "oasst1"]
NUM_ROUNDS = 3
KILLED_ROUND = 1
VICTIM = SITES[1]
WAIT_S = 300


def ranks_in(folder: Path) -> list[psutil.Process]:
    """The processes whose working folder is below ``folder``: only ranks' is."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kinds_of(site: Path, number: int) -> set[str]:
    """What the site has recorded of a round."""
    metrics = site / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["kind"] for record in records if record["round"] == number}


def is_before_training(site: Path) -> bool:
    """The round before is over here: its ranks are parked, and asked next to load and to evaluate."""
    return "round" in kinds_of(site, KILLED_ROUND - 1)


def is_in_training(site: Path) -> bool:
    """The round's model has been evaluated, which comes before its training."""
    return "eval" in kinds_of(site, KILLED_ROUND)


def is_after_training(site: Path) -> bool:
    """The round's result is there; it is sent, and the state is being written."""
    return "round" in kinds_of(site, KILLED_ROUND)


def kill_rank(workspace: Path, is_reached: Callable[[Path], bool], killed: list[int]) -> None:
    site = workspace / VICTIM / "simulate_job"
    deadline = time.monotonic() + WAIT_S
    while not is_reached(site) and time.monotonic() < deadline:
        time.sleep(0.005)
    for rank in ranks_in(site / "rank_logs"):
        if rank.environ()["RANK"] == "1":
            rank.kill()
            killed.append(rank.pid)


def rounds_of(run: Run, site: str) -> list[int]:
    return [record["round"] for record in run.records(site, kind="round")]


@pytest.mark.parametrize("stage", [is_before_training, is_in_training, is_after_training])
def test_a_killed_rank_costs_its_site_a_round_at_most(tmp_path: Path, model: Path, stage):
    data = write_site_data(tmp_path / "data", SITES, num_rows=16)
    settings = {"num_clients": len(SITES), "num_rounds": NUM_ROUNDS, "quorum": 1, "grace_s": WAIT_S}
    job = copy_job(
        "sft_int8",
        tmp_path / "job",
        server=settings,
        client=lambda config: executor_args(config).update(num_processes=2),
    )
    workspace, killed = tmp_path / "workspace", []
    killer = threading.Thread(target=kill_rank, args=[workspace, stage, killed])
    killer.start()
    run = simulate(job, workspace, sites=SITES, model=model, data=data, timeout_s=2 * WAIT_S)
    killer.join()
    print("killed", killed, "left", [rank.pid for rank in ranks_in(workspace)])
    print({site: rounds_of(run, site) for site in SITES})
    assert len(killed) == 1
    assert run.exit_code == 0, run.output[-4000:]
    assert run.final_round() == NUM_ROUNDS - 1
    assert f"at site '{VICTIM}': RankError: Rank 1 of 2 was killed by SIGKILL" in run.log("server")
    for site in (site for site in SITES if site != VICTIM):
        assert [record["num_examples"] for record in run.records(site, kind="round")] == [16] * NUM_ROUNDS
    # The round that failed is not trained here a second time: the others' results make it up.
    assert len(rounds_of(run, VICTIM)) in (NUM_ROUNDS - 1, NUM_ROUNDS)
    assert rounds_of(run, VICTIM)[0] == 0
    assert not ranks_in(workspace)
