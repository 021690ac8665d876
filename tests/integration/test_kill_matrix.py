"""Kills a simulated job at each stage of a round, continues it, and compares with a run left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nvflare_llm_components.checkpoint.record import read_record, verify_files
from nvflare_llm_components.tools.resume import resume_job
from tests.integration.simulator import Run, copy_job, simulate, variables_of

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SITE = ["dolly"]
ROUNDS = 3
KILLED_ROUND = 1
STAGE_TIMEOUT_S = 180


def log_of(workspace: Path, site: str) -> str:
    file = workspace / site / "log.txt"
    return file.read_text() if file.exists() else ""


def last(workspace: Path) -> Path:
    return workspace / "server/simulate_job/global_model/last"


def in_training(workspace: Path) -> bool:
    return f"Round {KILLED_ROUND} started" in log_of(workspace, "server")


def trained_before_save(workspace: Path) -> bool:
    return log_of(workspace, "server").count("Aggregated 1/1 results") > KILLED_ROUND


def in_save(workspace: Path) -> bool:
    return saved(workspace) and any(last(workspace).parent.glob(".last.writing/*"))


def saved(workspace: Path) -> bool:
    return last(workspace).exists() and read_record(last(workspace)).get("round", -1) >= KILLED_ROUND - 1


def after_save(workspace: Path) -> bool:
    return last(workspace).exists() and read_record(last(workspace)).get("round", -1) >= KILLED_ROUND


STAGES: dict[str, Callable[[Path], bool]] = {
    "in the first round": lambda workspace: "Round 0 started" in log_of(workspace, "server"),
    "before a round's training": in_training,
    "before a save": trained_before_save,
    "during a save": in_save,
    "after a save": after_save,
}


def start(job: Path, workspace: Path, model: Path, data: Path) -> subprocess.Popen[bytes]:
    variables = variables_of(model, data)
    allow = [sys.executable, "-m", "nvflare_llm_components.cli", "allow", str(workspace)]
    subprocess.run(allow, check=True, env=variables, capture_output=True, timeout=60)
    command = [sys.executable, "-m", "nvflare.cli", "simulator", str(job), "-w", str(workspace)]
    return subprocess.Popen(
        [*command, "-c", ",".join(SITE), "-t", str(len(SITE))],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_at(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Kill server and clients at once, the moment a stage is reached."""
    deadline = time.monotonic() + STAGE_TIMEOUT_S
    try:
        while not reached():
            assert process.poll() is None, "the job ended before the stage was reached"
            assert time.monotonic() < deadline, "the stage was not reached"
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"num_clients": len(SITE), "num_rounds": ROUNDS}
    return copy_job("sft", tmp_path_factory.mktemp("job") / "sft", server=settings, client=never_lose_state)


def never_lose_state(config: dict[str, object]) -> None:
    """Shuffled data, momentum and a decaying rate: all of it must continue where it stopped."""
    executors = config["executors"]
    assert isinstance(executors, list)
    args = executors[0]["executor"]["args"]
    args["checkpoint"] = "always"
    args["sft_config"]["lr_scheduler_type"] = "cosine"


@pytest.fixture(scope="module")
def undisturbed(job: Path, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return simulate(job, tmp_path_factory.mktemp("undisturbed") / "ws", sites=SITE, model=model, data=data)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_continues_to_the_same_weights(
    stage: str, job: Path, model: Path, data: Path, undisturbed: Run, tmp_path: Path
):
    dead = tmp_path / "dead"
    kill_at(start(job, dead, model, data), lambda: STAGES[stage](dead))
    if last(dead).exists():
        verify_files(last(dead))
    print(resume_job(dead / "server/simulate_job", tmp_path / "job"))
    resumed = simulate(tmp_path / "job", tmp_path / "resumed", sites=SITE, model=model, data=data)
    assert resumed.exit_code == 0, resumed.output[-4000:]
    assert resumed.final_round() == ROUNDS - 1
    for name in ("last", "best"):
        expected, found = undisturbed.weights(name), resumed.weights(name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), f"{stage}: {name}"
