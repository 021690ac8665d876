"""Kills processes of a simulated job at the stages of a round, continues it, compares with one left alone."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from nvflare_llm_components.checkpoint.manifest import read_manifest, verify_files
from nvflare_llm_components.tools.resume import resume_job
from tests.integration.simulator import SITES, Run, copy_job, edit, executor_args, simulate, variables_of

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SITE = SITES[:1]
ALSO_ALLOW = ["torch.optim.SGD"]  # of FedOpt's server
ROUNDS = 3
KILLED_ROUND = 1
STAGE_TIMEOUT_S = 180
DEATH_TIMEOUT_S = 60
WORKER = "nvflare.private.fed.app.simulator.simulator_worker"


def log_of(workspace: Path, site: str) -> str:
    file = workspace / site / "log.txt"
    return file.read_text() if file.exists() else ""


def last(workspace: Path) -> Path:
    return workspace / "server/simulate_job/global_model/last"


def saved_round(workspace: Path) -> int:
    return int(read_manifest(last(workspace)).get("round", -1)) if last(workspace).exists() else -1


def in_first_round(workspace: Path) -> bool:
    return "Round 0 started" in log_of(workspace, "server")


def before_training(workspace: Path) -> bool:
    return f"Round {KILLED_ROUND} started" in log_of(workspace, "server")


def in_training(workspace: Path) -> bool:
    """A site has evaluated the round's model, which it does before it trains."""
    metrics = workspace / SITE[0] / "simulate_job/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return any(json.loads(line)["round"] == KILLED_ROUND for line in lines if line.endswith("\n"))


def one_result_is_in(workspace: Path) -> bool:
    return log_of(workspace, "server").count("Aggregated 1/2 results") > KILLED_ROUND


def before_save(workspace: Path) -> bool:
    return len(re.findall(r"Aggregated (\d)/\1 results", log_of(workspace, "server"))) > KILLED_ROUND


def in_save(workspace: Path) -> bool:
    return saved_round(workspace) == KILLED_ROUND - 1 and any(last(workspace).parent.glob(".last.writing/*"))


def after_save(workspace: Path) -> bool:
    return saved_round(workspace) >= KILLED_ROUND


def all_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The simulator, its server, and its clients, which have process groups of their own."""
    simulator = psutil.Process(process.pid)
    return [simulator, *simulator.children(recursive=True)]


def clients_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [child for child in all_of(process) if WORKER in child.cmdline()]


def server_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process that the clients are children of."""
    return [parent for client in clients_of(process)[:1] if (parent := client.parent())]


def client_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [client for client in clients_of(process) if SITE[0] in client.cmdline()]


def start(job: Path, workspace: Path, sites: list[str], model: Path, data: Path) -> subprocess.Popen[bytes]:
    variables = variables_of(model, data)
    allow = [sys.executable, "-m", "nvflare_llm_components.cli", "allow", str(workspace), "--new"]
    allow += [word for entry in ALSO_ALLOW for word in ("--also", entry)]
    subprocess.run(allow, check=True, env=variables, capture_output=True, timeout=60)
    command = [sys.executable, "-m", "nvflare.cli", "simulator", str(job), "-w", str(workspace)]
    return subprocess.Popen(
        [*command, "-c", ",".join(sites), "-t", str(len(sites))],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():  # an id that was given to another process meanwhile is left alone
            process.kill()


def kill_at(
    process: subprocess.Popen[bytes],
    reached: Callable[[], bool],
    victims: Callable[[subprocess.Popen[bytes]], list[psutil.Process]],
) -> None:
    """Kill -9 the moment a stage is reached, and return when the others are dead as well, of themselves."""
    deadline = time.monotonic() + STAGE_TIMEOUT_S
    family: list[psutil.Process] = []
    try:
        while not reached():
            assert process.poll() is None, "the job ended before the stage was reached"
            assert time.monotonic() < deadline, "the stage was not reached"
            time.sleep(0.002)
        chosen, family = victims(process), all_of(process)
        kill(chosen)
        assert chosen, "there was no such process"
        _, alive = psutil.wait_procs(family, timeout=DEATH_TIMEOUT_S)
        assert not alive, "the simulator goes on without them"
    finally:
        kill(family or all_of(process))
        process.wait()


def never_lose_state(config: dict[str, object]) -> None:
    """Shuffled data, momentum and a decaying rate: all of it must continue where it stopped."""
    executor_args(config)["checkpoint"] = "always"
    executor_args(config)["sft_config"]["lr_scheduler_type"] = "cosine"


def job_of(name: str, sites: list[str], folder: Path) -> Path:
    settings = {"num_clients": len(sites), "num_rounds": ROUNDS}
    return copy_job(name, folder / name, server=settings, client=never_lose_state)


def continued(dead: Path, sites: list[str], model: Path, data: Path, folder: Path) -> Run:
    """The run that goes on from a dead one in the same workspace, which FLARE wipes first."""
    if last(dead).exists():
        verify_files(last(dead))
    print(resume_job(dead, folder / "job"))
    options = {"sites": sites, "model": model, "data": data, "also_allow": ALSO_ALLOW}
    return simulate(folder / "job", dead, **options)


def assert_same(resumed: Run, undisturbed: Run) -> None:
    assert resumed.exit_code == 0, resumed.output[-4000:]
    assert resumed.final_round() == ROUNDS - 1
    for name in ("last", "best"):
        expected, found = undisturbed.weights(name), resumed.weights(name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


@pytest.fixture(scope="module")
def one_site(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> tuple[Path, Run]:
    """A job of one site, and its run left alone."""
    folder = tmp_path_factory.mktemp("one_site")
    job = job_of("sft", SITE, folder)
    return job, simulate(job, folder / "ws", sites=SITE, model=model, data=data)


@pytest.fixture(scope="module")
def two_sites(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> tuple[Path, Run]:
    """A job of two sites whose average has an order, and its run left alone."""
    folder = tmp_path_factory.mktemp("two_sites")
    job = job_of("sft_exact", SITES, folder)
    return job, simulate(job, folder / "ws", sites=SITES, model=model, data=data)


@pytest.mark.parametrize(
    ("victims", "stage"),
    [
        (all_of, in_first_round),
        (all_of, before_training),
        (all_of, before_save),
        (all_of, in_save),
        (all_of, after_save),
        (server_of, in_training),
        (server_of, in_save),
        (client_of, in_training),
    ],
)
def test_a_killed_run_continues_to_the_same_weights(
    victims, stage, one_site: tuple[Path, Run], model: Path, data: Path, tmp_path: Path
):
    job, undisturbed = one_site
    dead = tmp_path / "dead"
    kill_at(start(job, dead, SITE, model, data), lambda: stage(dead), victims)
    assert_same(continued(dead, SITE, model, data, tmp_path), undisturbed)


@pytest.mark.parametrize("stage", [one_result_is_in, in_save])
def test_two_sites_continue_to_the_same_weights(
    stage, two_sites: tuple[Path, Run], model: Path, data: Path, tmp_path: Path
):
    job, undisturbed = two_sites
    dead = tmp_path / "dead"
    kill_at(start(job, dead, SITES, model, data), lambda: stage(dead), all_of)
    assert_same(continued(dead, SITES, model, data, tmp_path), undisturbed)


@pytest.mark.parametrize("name", ["sft_fedopt", "sft_initialize_weights"])
def test_a_server_that_holds_the_model_elsewhere_continues_to_the_same_weights(
    name: str, model: Path, data: Path, tmp_path: Path
):
    """FedOpt keeps it in a module, InitializeGlobalWeights had it of a site: neither may begin again."""
    job = job_of(name, SITE, tmp_path)
    if name == "sft_fedopt":  # momentum does not outlive a server
        edit(job / "app/config/config_fed_server.json", lambda config: config.update(server_momentum=0.0))
    options = {"sites": SITE, "model": model, "data": data, "also_allow": ALSO_ALLOW}
    undisturbed = simulate(job, tmp_path / "ws", **options)
    dead = tmp_path / "dead"
    kill_at(start(job, dead, SITE, model, data), lambda: after_save(dead), all_of)
    assert_same(continued(dead, SITE, model, data, tmp_path / "new"), undisturbed)
