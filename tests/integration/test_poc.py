"""FLARE as it is deployed: a server and two sites as daemons with certificates, one process a job."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.simulator import NUM_ROUNDS, copy_job, variables_of
from tests.tiny import write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SITES = ["site-1", "site-2"]
TIMEOUT_S = 120


@dataclass(frozen=True)
class Poc:
    """A proof-of-concept deployment that is up."""

    folder: Path
    variables: dict[str, str]

    def cli(self, *words: str, module: str = "nvflare.cli") -> str:
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(
            command, env=self.variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, job: Path) -> str:
        found = re.search(
            r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", self.cli("job", "submit", "-j", str(job))
        )
        return found[0] if found else pytest.fail("no job id")

    def run_dir(self, site: str, job_id: str) -> Path:
        return self.folder / "example_project" / "prod_00" / site / job_id

    def ending(self, job_id: str) -> str:
        """How a job ended; waits for it."""

        def ended() -> str | None:
            lines = [line for line in self.cli("job", "list").splitlines() if job_id[:8] in line]
            found = re.search(r"FINISHED:\w+", "".join(lines))
            return found and found[0]

        return wait_for(ended)

    def processes(self, *words: str) -> list[int]:
        """Ids of this deployment's processes whose command has all the words."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().decode()
            except OSError:
                continue
            if all(word in command for word in [str(self.folder), *words]):
                found.append(int(folder.name))
        return found


def wait_for(ask: Callable[[], object], seconds: float = TIMEOUT_S):
    """The first answer that is true."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.1)
    return answer


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Poc]:
    folder = tmp_path_factory.mktemp("poc")
    data = write_site_data(folder / "data", SITES, num_rows=200)
    # FLARE keeps its settings at home.
    places = {"HOME": str(folder / "home"), "NVFLARE_POC_WORKSPACE": str(folder / "workspace")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the kits call python3
    (folder / "home").mkdir()
    poc = Poc(folder / "workspace", variables_of(model, data) | places | {"PATH": path})
    poc.cli("poc", "prepare", "-n", str(len(SITES)))
    poc.cli("allow", str(poc.folder), module="nvflare_llm_components.cli")
    try:
        poc.cli("poc", "start")
        yield poc
    finally:
        poc.cli("poc", "stop")
        wait_for(lambda: not poc.processes(), seconds=30)


def job(folder: Path, local_epochs: float) -> Path:
    server = {"num_clients": len(SITES), "num_rounds": NUM_ROUNDS}
    return copy_job("sft_exact", folder / "job", server=server, client={"local_epochs": local_epochs})


def records(run_dir: Path, kind: str) -> list[dict[str, object]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    # The last line may be half written.
    return [json.loads(line) for line in lines if f'"kind": "{kind}"' in line and line.endswith("}")]


def test_a_deployed_federation_completes_and_leaves_no_state(poc: Poc, tmp_path: Path):
    job_id = poc.submit(job(tmp_path, 0.1))
    assert poc.ending(job_id) == "FINISHED:COMPLETED"
    for site in SITES:
        assert [record["round"] for record in records(poc.run_dir(site, job_id), "round")] == [0, 1]
        assert not (poc.run_dir(site, job_id) / "trainer_state").exists()


def test_a_killed_site_ends_the_job_and_keeps_its_last_round(poc: Poc, tmp_path: Path):
    # The other site trains on until FLARE has noticed: seconds, far less than a round takes here.
    job_id = poc.submit(job(tmp_path, 8))
    killed = poc.run_dir(SITES[0], job_id)
    wait_for(lambda: [r for r in records(killed, "train") if r["round"] == 1])
    (worker,) = poc.processes("worker_process", job_id, f"/{SITES[0]}/startup")
    os.kill(worker, signal.SIGKILL)
    assert poc.ending(job_id) == "FINISHED:EXECUTION_EXCEPTION"
    wait_for(lambda: not poc.processes("worker_process", job_id))
    for site in SITES:
        run_dir = poc.run_dir(site, job_id)
        (round_zero,) = records(run_dir, "round")
        states = [path.name for path in (run_dir / "trainer_state").iterdir()]
        assert states == [f"step-{round_zero['end_step']}"]
