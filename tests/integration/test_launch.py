"""A job that was submitted with our launcher, and whose server is killed in the middle of a round."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.deployment import Poc, deployed, records, tell_cell, wait_for
from tests.integration.simulator import copy_job, edit, variables_of
from tests.tiny import write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SITES = ["site-1", "site-2"]
NUM_ROUNDS = 3
SECONDS = 400


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Poc]:
    folder = tmp_path_factory.mktemp("launch")
    data = write_site_data(folder / "data", SITES, num_rows=200)
    with deployed(folder, SITES, variables_of(model, data)) as poc:
        yield poc


def job(folder: Path) -> Path:
    server = {"num_clients": len(SITES), "num_rounds": NUM_ROUNDS}
    copied = copy_job("sft_exact", folder / "job", server=server, client={"local_epochs": 2})
    # After the restart the sites come back one by one: the job must wait for both.
    edit(copied / "meta.json", lambda meta: meta.update(min_clients=len(SITES)))
    return copied


def submit(poc: Poc, job: Path, out: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "nvflare_llm_components.cli", "submit", str(job)]
    words += ["--kit", str(poc.kit("admin@nvidia.com")), "--out", str(out)]
    return subprocess.Popen(
        words, env=poc.variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def chain(out: Path) -> list[dict[str, Any]]:
    file = out / "chain.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.is_file() else []
    return runs


def taken(out: Path) -> str:
    job_id: str = wait_for(lambda: chain(out) and chain(out)[-1]["job_id"])
    return job_id


def weights(download: Path) -> dict[str, torch.Tensor]:
    return load_file(download / "workspace/global_model/last/model.safetensors")


def kill_server(poc: Poc) -> None:
    """Its processes, as a crash of the machine's kernel would; the kit's own daemon starts it again."""
    processes = [psutil.Process(pid) for pid in poc.processes("/prod_00/server", "python")]
    assert len(processes) == 2, "FLARE's server, and the job's"
    for process in processes:
        process.suspend()
    for process in processes:
        process.kill()


def test_a_job_goes_on_by_itself_after_its_server_was_killed(poc: Poc, tmp_path: Path):
    with submit(poc, job(tmp_path / "undisturbed"), tmp_path / "expected") as undisturbed:
        output, _ = undisturbed.communicate(timeout=SECONDS)
    assert undisturbed.returncode == 0, output
    out, began = tmp_path / "out", time.monotonic()
    with submit(poc, job(tmp_path / "disturbed"), out) as launcher:
        killed = taken(out)
        wait_for(lambda: [r for r in records(poc.run_dir(SITES[0], killed), "train") if r["round"] == 1])
        kill_server(poc)
        output, _ = launcher.communicate(timeout=SECONDS)
    print(output)
    assert launcher.returncode == 0, output
    seconds = time.monotonic() - began
    runs = chain(out)
    assert [run["ending"] for run in runs] == ["server restarted", "FINISHED:COMPLETED"]
    assert runs[0]["saved_round"] == 0
    resumed = runs[1]["job_id"]
    record = json.loads((out / resumed / "workspace/global_model/last/federation.json").read_text())
    assert [entry["job_id"] for entry in (*record["rounds"], record)] == [killed, resumed, resumed]
    for site in SITES:
        assert f"trainer_state continues from {poc.run_dir(site, killed)}" in poc.log(site, resumed)
    expected = weights(tmp_path / "expected" / taken(tmp_path / "expected"))
    found = weights(out / resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    lost = "the round that was trained; same bits as undisturbed"
    tell_cell("server killed, in_training, `nvflare-llm submit`", "completed by itself", lost, seconds)


def test_a_site_that_comes_back_late_is_in_the_job_that_continues(poc: Poc, tmp_path: Path):
    """`min_clients` is 1 here: FLARE would begin without the other."""
    copied = job(tmp_path / "job")
    edit(copied / "meta.json", lambda meta: meta.update(min_clients=1))
    out, began = tmp_path / "out", time.monotonic()
    with submit(poc, copied, out) as launcher:
        killed = taken(out)
        wait_for(lambda: [r for r in records(poc.run_dir(SITES[0], killed), "train") if r["round"] == 1])
        late = [psutil.Process(pid) for pid in poc.processes(f"/prod_00/{SITES[1]}", "python")]
        for process in late:
            process.suspend()
        kill_server(poc)
        printed = ""
        assert launcher.stdout
        while "until these sites are connected again" not in printed:
            printed += launcher.stdout.readline()
        time.sleep(20)
        for process in late:
            process.resume()
        output, _ = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 0, printed + output
    rounds = (out / taken(out) / "workspace/rounds.jsonl").read_text().splitlines()
    assert [sorted(json.loads(line)["sites"]) for line in rounds] == [SITES] * (NUM_ROUNDS - 1)
    lost = "the round that was trained; both sites are in the job that continues"
    what = "server killed, a site back late, `nvflare-llm submit`"
    tell_cell(what, "completed by itself", lost, time.monotonic() - began)


def test_a_server_that_is_killed_in_the_last_evaluation_does_that_again(poc: Poc, tmp_path: Path):
    """No round is left to do: the job that continues evaluates the saved model, under its own round."""
    out, began = tmp_path / "out", time.monotonic()
    with submit(poc, job(tmp_path / "job"), out) as launcher:
        killed = taken(out)
        manifest = poc.run_dir("server", killed) / "global_model/last/federation.json"

        def has_last_model() -> bool:
            with suppress(OSError):  # it is being replaced
                return bool(json.loads(manifest.read_text())["round"] == NUM_ROUNDS - 1)
            return False

        wait_for(has_last_model)
        kill_server(poc)
        output, _ = launcher.communicate(timeout=SECONDS)
    assert launcher.returncode == 0, output
    workspace = out / taken(out) / "workspace"
    assert [run["saved_round"] for run in chain(out)] == [NUM_ROUNDS - 1, None]
    evaluation = json.loads((workspace / "final_evaluation.json").read_text())
    assert evaluation["round"] == NUM_ROUNDS - 1
    assert sorted(evaluation["sites"]) == SITES
    assert (
        json.loads((workspace / "global_model/last/federation.json").read_text())["round"] == NUM_ROUNDS - 1
    )
    what = "server killed, last_evaluation, `nvflare-llm submit`"
    tell_cell(what, "completed by itself", "the evaluation is done again", time.monotonic() - began)
