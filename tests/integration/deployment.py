"""FLARE as it is deployed: a server and sites as daemons with certificates, one process a job."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.integration.disk import small_disk
from tests.integration.line import Line

TIMEOUT_S = 900
JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Poc:
    """A proof-of-concept deployment that is up.

    Attributes:
        lines: to the server, by site; empty where sites reach it directly.
    """

    folder: Path
    variables: dict[str, str]
    lines: dict[str, Line] = field(default_factory=dict)

    def cli(self, *words: str, module: str = "nvflare.cli", variables: dict[str, str] | None = None) -> str:
        command = [sys.executable, "-m", module, *words]
        env = self.variables | (variables or {})
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, job: Path) -> str:
        found = JOB_ID.search(self.cli("job", "submit", "-j", str(job)))
        return found[0] if found else pytest.fail("no job id")

    def download(self, job_id: str, folder: Path) -> Path:
        self.cli("job", "download", job_id, "-o", str(folder))
        return folder / job_id

    def kit(self, site: str) -> Path:
        return self.folder / "example_project" / "prod_00" / site

    def run_dir(self, site: str, job_id: str) -> Path:
        return self.kit(site) / job_id

    def num_registered(self, site: str) -> int:
        """How often the server has taken a site."""
        file = self.kit(site) / "log.txt"
        return file.read_text().count("Successfully registered client") if file.exists() else 0

    def log(self, site: str, job_id: str) -> str:
        file = self.run_dir(site, job_id) / "log.txt"
        return file.read_text() if file.exists() else ""

    def ending(self, job_id: str, seconds: float = TIMEOUT_S) -> str:
        """How a job ended; waits for it."""

        def ended() -> str | None:
            lines = [line for line in self.cli("job", "list").splitlines() if job_id[:8] in line]
            found = re.search(r"FINISHED:\w+", "".join(lines))
            return found and found[0]

        return wait_for(ended, seconds, every_s=5)  # a call of FLARE's command is seconds of a core

    def processes(self, *words: str) -> list[int]:
        """Ids of this deployment's processes whose command has all the words."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or [])
            if all(word in command for word in [str(self.folder), *words]):
                found.append(process.pid)
        return found

    def stop(self) -> None:
        """As a person would; FLARE refuses while its store has a job that a killed server was running."""
        with suppress(AssertionError):
            self.cli("poc", "stop")
            wait_for(lambda: not self.processes(), seconds=60)
        for pid in self.processes():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()

    def worker(self, site: str, job_id: str) -> psutil.Process:
        """The process of a job at a site."""
        (found,) = self.processes("worker_process", job_id, f"/{site}/startup")
        return psutil.Process(found)


def wait_for(ask: Callable[[], Any], seconds: float = TIMEOUT_S, every_s: float = 0.1) -> Any:
    """The first answer that is true."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(every_s)
    return answer


def tell_cell(what: str, outcome: str, lost: str, seconds: float, **facts: Any) -> None:
    """Print a cell of the fault matrix, and hand it to ``benchmarks.faults`` where that one asks."""
    print(f"\n{what}: {outcome}; {lost}; {seconds:.0f} s", *(f"; {name} {facts[name]}" for name in facts))
    if file := os.environ.get("NVFLARE_LLM_CELLS"):
        row = {"what": what, "outcome": outcome, "lost": lost, "seconds": round(seconds), **facts}
        with Path(file).open("a") as lines:
            lines.write(json.dumps(row) + "\n")


@contextmanager
def deployed(
    folder: Path,
    sites: Sequence[str],
    variables: dict[str, str],
    rates: dict[str, float | None] | None = None,
    disks: dict[str, int] | None = None,
) -> Iterator[Poc]:
    """A server and sites, up.

    Args:
        folder: for all of it.
        sites: their names.
        variables: environment of everybody.
        rates: sites that reach the server over a line of so many bits a second.
        disks: the server or sites whose kits, run directories included, have a disk of so many megabytes.
    """
    port = free_port()
    lines = {site: Line(port, rate) for site, rate in (rates or {}).items()}
    for line in lines.values():
        line.open()
    # FLARE keeps its settings at home.
    places = {"HOME": str(folder / "home"), "NVFLARE_POC_WORKSPACE": str(folder / "workspace")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the kits call python3
    (folder / "home").mkdir()
    poc = Poc(folder / "workspace", variables | places | {"PATH": path}, lines)
    (folder / "project.yml").write_text(project(sites, port, lines))
    poc.cli("poc", "prepare", "-i", str(folder / "project.yml"))
    poc.cli("allow", str(poc.folder), module="nvflare_llm_components.cli")
    with ExitStack() as ends:
        for line in lines.values():
            ends.callback(line.close)
        for name, megabytes in (disks or {}).items():
            ends.enter_context(small_disk(poc.kit(name), megabytes))
        ends.callback(poc.stop)
        poc.cli("poc", "start", "--no-wait")  # which else gives up after 30 s
        for site in sites:
            wait_for(lambda site=site: poc.num_registered(site))
        yield poc


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """A site's records of a kind, as far as they are written."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if f'"kind": "{kind}"' in line and line.endswith("}")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def project(sites: Sequence[str], port: int, lines: dict[str, Line]) -> str:
    """A project file for provisioning, in which some sites reach the server by a port of their own."""
    server = {"name": "server", "type": "server", "org": "nvidia", "default_host": "localhost"}
    admin = {"name": "admin@nvidia.com", "type": "admin", "org": "nvidia", "role": "project_admin"}
    clients: list[dict[str, Any]] = [{"name": site, "type": "client", "org": "nvidia"} for site in sites]
    for client in clients:
        if line := lines.get(client["name"]):
            client["connect_to"] = {"host": "localhost", "port": line.port}
    impl = "nvflare.lighter.impl"
    builders = [
        {
            "path": f"{impl}.workspace.WorkspaceBuilder",
            "args": {"template_file": ["master_template.yml", "aws_template.yml", "azure_template.yml"]},
        },
        {"path": f"{impl}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
        {"path": f"{impl}.cert.CertBuilder"},
        {"path": f"{impl}.signature.SignatureBuilder"},
    ]
    participants = [server | {"fed_learn_port": port}, admin, *clients]
    content = {"api_version": 3, "name": "example_project", "description": "test"}
    return yaml.safe_dump(content | {"participants": participants, "builders": builders})
