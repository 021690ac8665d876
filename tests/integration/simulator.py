"""Runs the real ``nvflare simulator`` in a subprocess and reads what it leaves behind.

Its exit code is 0 even when clients died, so success is judged by artefacts: see :func:`assert_completed`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

JOB_CONFIGS = Path(__file__).parents[2] / "job_configs"
TIMEOUT_S = 300
SITES = ["dolly", "alpaca"]
NUM_ROUNDS = 2


@dataclass(frozen=True)
class Run:
    """A finished simulator run."""

    workspace: Path
    sites: list[str]
    exit_code: int
    output: str

    def run_dir(self, site: str) -> Path:
        return self.workspace / site / "simulate_job"

    def log(self, site: str) -> str:
        return (self.workspace / site / "log.txt").read_text()

    def records(self, site: str, name: str = "metrics", **where: object) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` or ``traffic.jsonl`` whose fields equal ``where``."""
        lines = (self.run_dir(site) / f"{name}.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if all(r.get(k) == v for k, v in where.items())]

    def model_dir(self, name: str = "last", site: str = "server") -> Path:
        return self.run_dir(site) / "global_model" / name

    def federation(self, name: str = "last", site: str = "server") -> dict[str, Any]:
        """What the persistor recorded beside a global model."""
        record: dict[str, Any] = json.loads((self.model_dir(name, site) / "federation.json").read_text())
        return record

    def weights(self, name: str = "last", site: str = "server") -> dict[str, Tensor]:
        folder = self.model_dir(name, site)
        files = sorted(folder.glob("*.safetensors"))
        assert files, f"no safetensors under {folder}"
        return {key: value for file in files for key, value in load_file(file).items()}

    def final_round(self) -> int:
        """The round that the saved global model belongs to."""
        return int(self.federation()["round"])


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites one JSON file of a job."""
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config, indent=2))


def copy_job(
    job: str,
    folder: Path,
    *,
    source: Path = JOB_CONFIGS,
    server: Callable[[dict[str, Any]], object] | dict[str, Any] | None = None,
    client: Callable[[dict[str, Any]], object] | dict[str, Any] | None = None,
) -> Path:
    """Copies a shipped job and edits it: a mapping sets top-level variables, a function may do anything."""
    shutil.copytree(source / job, folder)
    edit(folder / "meta.json", lambda meta: meta.update(min_clients=1))
    for side, change in (("server", server), ("client", client)):
        if change is not None:
            apply = change if callable(change) else lambda config, values=change: config.update(values)
            edit(folder / "app" / "config" / f"config_fed_{side}.json", apply)
    return folder


def executor_args(config: dict[str, Any]) -> dict[str, Any]:
    """The executor's arguments in a client's configuration."""
    args: dict[str, Any] = config["executors"][0]["executor"]["args"]
    return args


def variables_of(model: Path, data: Path) -> dict[str, str]:
    """The environment of a simulator: the job's model and data, one thread a process, no GPU, no hub."""
    return os.environ | {
        "NVFLARE_LLM_MODEL": str(model),
        "NVFLARE_LLM_DATA": str(data),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def simulate(
    job: Path,
    workspace: Path,
    *,
    sites: list[str],
    model: Path,
    data: Path,
    threads: int | None = None,
    environment: dict[str, str] | None = None,
    also_allow: Sequence[str] = (),
    policy: Sequence[str] = (),
    timeout_s: float = TIMEOUT_S,
) -> Run:
    """Allows our classes in ``workspace``, sets its ``policy`` and runs ``job`` there, as a user would."""
    variables = variables_of(model, data) | (environment or {})
    allow = [sys.executable, "-m", "nvflare_llm_components.cli", "allow", str(workspace), "--new"]
    allow += [word for entry in also_allow for word in ("--also", entry)]
    subprocess.run(allow, check=True, env=variables, capture_output=True, timeout=60)
    if policy:
        init = [sys.executable, "-m", "nvflare_llm_components.cli", "policy", "init", str(workspace)]
        init += [word for setting in policy for word in ("--set", setting)]
        subprocess.run(init, check=True, env=variables, capture_output=True, timeout=60)
    command = [sys.executable, "-m", "nvflare.cli", "simulator", str(job), "-w", str(workspace)]
    command += ["-c", ",".join(sites), "-t", str(threads or len(sites))]
    # FLARE's clients outlive a killed simulator: a session of its own lets a time-out reach them all.
    with subprocess.Popen(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
    return Run(workspace, sites, process.returncode, output)


def run_job(job: str, folder: Path, *, model: Path, data: Path, **options: Any) -> Run:
    """Runs a shipped job with two sites for two rounds; ``server`` and ``client`` edit it further."""

    def shorten(change: Callable[[dict[str, Any]], object] | None) -> Callable[[dict[str, Any]], object]:
        def apply(config: dict[str, Any]) -> None:
            short = {"num_clients": len(SITES), "num_rounds": NUM_ROUNDS}
            config.update({name: value for name, value in short.items() if name in config})
            if change:
                change(config)

        return apply

    server, client = (shorten(options.pop(side, None)) for side in ("server", "client"))
    copied = copy_job(job, folder / job, server=server, client=client)
    return simulate(copied, folder / "workspace", sites=SITES, model=model, data=data, **options)


def keep_every_round(config: dict[str, Any]) -> None:
    """Lets the persistor keep each round's global model, as ``round_0`` and so on."""
    config["components"][0]["args"]["keep"] = ["last", "best", "every 1"]


def assert_clean(run: Run) -> None:
    """Exit code 0 and no error in any log."""
    assert run.exit_code == 0, run.output[-4000:]
    for site in ["server", *run.sites]:
        errors = [line for line in run.log(site).splitlines() if " - ERROR - " in line or "CRITICAL" in line]
        assert not errors, f"{site}: {errors[:3]}"


def assert_completed(run: Run, *, num_rounds: int) -> None:
    """A completed job: exit code, clean logs, every round on every site, a saved model, paired filters."""
    assert_clean(run)
    assert run.final_round() == num_rounds - 1
    for site in run.sites:
        assert [r["round"] for r in run.records(site, kind="round")] == list(range(num_rounds))
        sent = run.records(site, "traffic", operation="quantize", task="train")
        received = run.records("server", "traffic", operation="dequantize", task="train")
        assert [r["round"] for r in sent] == list(range(num_rounds))
        assert len(received) == num_rounds * len(run.sites)


def global_losses(run: Run, site: str) -> list[float]:
    """Loss of the global model on one site's validation data, at the start of each round."""
    num_rounds = len(run.records(site, kind="round"))
    return [r["eval_loss"] for r in run.records(site, kind="eval")][:num_rounds]
