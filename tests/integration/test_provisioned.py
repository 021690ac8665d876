"""A provisioned federation under policies: mutual TLS, a server, three sites, a researcher, each a process.

The researcher has no right to bring code. `-s` prints the transcript.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvflare_llm_components.policy.site import POLICY_FILE
from nvflare_llm_components.tools.allow import allow
from nvflare_llm_components.tools.policy import check_job, init_policy
from tests.integration.simulator import NUM_ROUNDS, copy_job, variables_of
from tests.tiny import write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SITES = ["site-1", "site-2", "site-3"]
SERVER, RESEARCHER = "localhost", "lead@lab.org"
TIMEOUT_S = 240
ADMIN = """
import json, sys
from nvflare.fuel.flare_api.flare_api import new_secure_session
user, kit, job = sys.argv[1:]
session = new_secure_session(user, kit, timeout=60)
try:
    job_id = session.submit_job(job)
    print("submitted", job_id, file=sys.stderr)
    session.monitor_job(job_id, timeout=240, poll_interval=1)
    status = session.get_job_meta(job_id)["status"]
    print(json.dumps({"status": str(status), "result": session.download_job_result(job_id)}))
except Exception as error:
    print(json.dumps({"status": f"{type(error).__name__}: {error}"}))
finally:
    session.close()
"""


@dataclass(frozen=True)
class Outcome:
    """How a job ended for who submitted it."""

    status: str
    log: str


@dataclass(frozen=True)
class Federation:
    """Kits below one folder, with their processes running."""

    folder: Path
    variables: dict[str, str]

    def kit(self, name: str) -> Path:
        return self.folder / name

    def submit(self, job: Path) -> Outcome:
        """Submits as the researcher, waits for the end, and reads what came back."""
        command = [sys.executable, "-c", ADMIN, RESEARCHER, str(self.kit(RESEARCHER)), str(job)]
        done = subprocess.run(
            command, env=self.variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        logs = sorted(Path(told["result"]).rglob("log.txt")) if "result" in told else []
        outcome = Outcome(told["status"], "".join(log.read_text() for log in logs))
        print(f"\n$ submit {job.name}\n{outcome.status}")
        print("\n".join(line for line in outcome.log.splitlines() if "policy" in line or "Round " in line))
        return outcome

    def set_policy(self, *settings: str) -> None:
        """Each site's administrator writes the file anew; running processes need not be started again."""
        for site in SITES:
            (self.kit(site) / "local" / POLICY_FILE).unlink(missing_ok=True)
            init_policy(self.kit(site), settings)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def project() -> str:
    people = [
        {"name": SERVER, "type": "server", "org": "lab", "fed_learn_port": free_port()},
        *({"name": site, "type": "client", "org": "lab"} for site in SITES),
        {"name": RESEARCHER, "type": "admin", "org": "lab", "role": "lead"},
    ]
    builders = {
        "workspace.WorkspaceBuilder": {"template_file": ["master_template.yml"]},
        "static_file.StaticFileBuilder": {"config_folder": "config"},
        "cert.CertBuilder": {},
        "signature.SignatureBuilder": {},
    }
    listed = [{"path": f"nvflare.lighter.impl.{name}", "args": args} for name, args in builders.items()]
    content = {"api_version": 3, "name": "trial", "description": "trial", "participants": people}
    return json.dumps(content | {"builders": listed})  # JSON is YAML


def forbid_code(kit: Path) -> None:
    rules = json.loads((kit / "local/authorization.json.default").read_text())
    rules["permissions"]["lead"]["byoc"] = "none"
    (kit / "local/authorization.json").write_text(json.dumps(rules))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Federation]:
    root = tmp_path_factory.mktemp("provisioned")
    data = write_site_data(root / "data", SITES, num_rows=16)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the kits call python3
    variables = variables_of(model, data) | {"HOME": str(root), "PATH": path}
    (root / "project.yml").write_text(project())
    provision = [sys.executable, "-m", "nvflare.cli", "provision", "-p", "project.yml", "-w", "ws"]
    subprocess.run(provision, cwd=root, env=variables, check=True, capture_output=True, timeout=TIMEOUT_S)
    federation = Federation(root / "ws/trial/prod_00", variables)
    running = []
    for name in (SERVER, *SITES):
        allow(federation.kit(name))
        forbid_code(federation.kit(name))
        with (root / f"{name}.txt").open("wb") as output:
            command = ["bash", str(federation.kit(name) / "startup/sub_start.sh"), "--once"]
            process = subprocess.Popen(
                command, env=variables, stdout=output, stderr=output, start_new_session=True
            )
            running.append(process)
    try:
        yield federation
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def jobs(tmp_path: Path) -> dict[str, Path]:
    server = {"num_clients": len(SITES), "num_rounds": NUM_ROUNDS}
    return {name: copy_job(name, tmp_path / name, server=server) for name in ("sft_int8", "peft_lora")}


def test_jobs_of_json_alone_run_under_a_policy(federation: Federation, jobs: dict[str, Path]):
    federation.set_policy("places.job_files=false", "training.rounds=2", "adapters.max_rank=16")
    for job in jobs.values():
        outcome = federation.submit(job)
        assert "COMPLETED" in outcome.status, outcome.log[-3000:]


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        (
            "sft_int8",
            'leaves.weights="adapters"',
            "this site's policy expects an adapter, found 'whole weights'",
        ),
        (
            "peft_lora",
            'adapters.kinds=["IA3"]',
            "peft_config.peft_type: this site's policy expects one of ['IA3']",
        ),
    ],
)
def test_the_same_jobs_are_refused_where_the_policy_forbids_them(
    name: str, setting: str, words: str, federation: Federation, jobs: dict[str, Path], monkeypatch
):
    federation.set_policy(setting)
    for key in ("NVFLARE_LLM_MODEL", "NVFLARE_LLM_DATA"):
        monkeypatch.setenv(key, federation.variables[key])
    (beforehand,) = check_job(jobs[name], federation.kit("site-1"))
    assert words in beforehand
    outcome = federation.submit(jobs[name])
    assert "COMPLETED" not in outcome.status
    assert words in outcome.log
    audited = [log.read_text() for site in SITES for log in federation.kit(site).rglob("audit.log")]
    assert any("nvflare_llm refused: " in text and words[:40] in text for text in audited)


def test_code_is_refused_by_flare(federation: Federation, jobs: dict[str, Path]):
    custom = jobs["sft_int8"] / "app/custom"
    custom.mkdir()
    (custom / "evil.py").write_text("")
    assert "COMPLETED" not in federation.submit(jobs["sft_int8"]).status
