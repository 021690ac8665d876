"""Two processes a site in a real job: a rank is killed, its site is named and comes back, nothing is left."""

import json
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.simulator import SITES, Run, copy_job, executor_args, simulate

pytestmark = [pytest.mark.integration, pytest.mark.slow]
NUM_ROUNDS = 3
KILLED_ROUND = 1
VICTIM = SITES[1]
WAIT_S = 240


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


def has_begun(metrics: Path) -> bool:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return any(json.loads(line)["round"] == KILLED_ROUND for line in lines if line.endswith("\n"))


def kill_rank(workspace: Path, killed: list[int]) -> None:
    site = workspace / VICTIM / "simulate_job"
    deadline = time.monotonic() + WAIT_S
    while not has_begun(site / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.01)
    for rank in ranks_in(site / "rank_logs"):
        if rank.environ()["RANK"] == "1":
            rank.kill()
            killed.append(rank.pid)


def rounds_of(run: Run, site: str) -> list[int]:
    return [record["round"] for record in run.records(site, kind="round")]


def test_a_killed_rank_costs_its_site_a_round(tmp_path: Path, model: Path, data: Path):
    settings = {"num_clients": len(SITES), "num_rounds": NUM_ROUNDS, "quorum": 1, "grace_s": WAIT_S}
    job = copy_job(
        "sft_int8",
        tmp_path / "job",
        server=settings,
        client=lambda config: executor_args(config).update(num_processes=2),
    )
    workspace, killed = tmp_path / "workspace", []
    killer = threading.Thread(target=kill_rank, args=[workspace, killed])
    killer.start()
    run = simulate(job, workspace, sites=SITES, model=model, data=data)
    killer.join()
    assert len(killed) == 1
    assert run.exit_code == 0, run.output[-4000:]
    assert run.final_round() == NUM_ROUNDS - 1
    assert f"at site '{VICTIM}': RankError: Rank 1 of 2 was killed by SIGKILL" in run.log("server")
    assert rounds_of(run, SITES[0]) == list(range(NUM_ROUNDS))
    assert set(rounds_of(run, VICTIM)) >= {0, NUM_ROUNDS - 1} or rounds_of(run, VICTIM) == [0, 1]
    assert [record["num_examples"] for record in run.records(SITES[0], kind="round")] == [16] * NUM_ROUNDS
    assert not ranks_in(workspace)
