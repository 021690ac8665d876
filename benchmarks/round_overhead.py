"""Job time over pure training time: ours beside stock flare.patch in an external process, in one run.

    python -m benchmarks.round_overhead --mib 347

Job time is from the first task sent to the last model saved, by FLARE's own log, so it includes the start of
the site's process and loading its model; pure training is one train() call of the same steps. What is left is
split in what the first round costs more than the others (once), and what these cost beyond their training.
The run "messages" does not train at all: what FLARE takes to start a site and to carry fp32 messages. Ratios
travel to other machines, seconds do not.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.random_model import MIB, config_of_size, save_random_model
from benchmarks.record import record
from benchmarks.round_overhead_app.common import sft_settings
from benchmarks.round_trip import SAVED, round_seconds, wall_s
from benchmarks.round_trip_app.jobs import precision_filters, sends_change
from nvflare_llm_components.tools.environment import with_recommended
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[1]
APP = Path(__file__).parent / "round_overhead_app"
STOCK_MODEL = Path(__file__).parent / "round_trip_app" / "round_trip_parts.py"


@dataclass(frozen=True)
class Plan:
    """What every run trains."""

    settings_file: Path
    num_rounds: int
    num_steps: int
    checkpoint: str

    @property
    def settings(self) -> dict[str, Any]:
        """The settings file's content."""
        return json.loads(self.settings_file.read_text())


def prepare(folder: Path, mib: int, batch_size: int, num_tokens: int) -> tuple[Path, int]:
    """Write model, tokenizer, rows and settings; return the settings file and the model's size in bytes."""
    size = save_random_model(folder / "model", config_of_size(mib))
    tiny_tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [{"text": "".join(draw.choices("abcdefgh ", k=num_tokens))} for _ in range(16 * batch_size)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(folder / "model"),
        "data": str(folder / "rows.jsonl"),
        "sft": sft_settings(batch_size, num_tokens),
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder / "settings.json", size


def pure_seconds(plan: Plan, folder: Path) -> float:
    """Time one centralized train() call in a process of its own."""
    steps = str(plan.num_rounds * plan.num_steps)
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{APP.name}.pure",
        str(plan.settings_file),
        str(folder),
        steps,
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return float(output.split("seconds: ")[1].split()[0])


def executor_of(side: str, plan: Plan, folder: Path) -> dict[str, Any]:
    """The client's executor: ours, none that trains, or flare.patch in an external process."""
    if side == "messages":
        return {"path": f"{STOCK_MODEL.stem}.AddingExecutor", "args": {"is_ours": True}}
    if side.startswith("ours"):
        return {
            "path": "nvflare_llm_components.executors.HFSFTExecutor",
            "args": {
                "model_name_or_path": plan.settings["model"],
                "train_data": plan.settings["data"],
                "sft_config": plan.settings["sft"],
                "local_steps": plan.num_steps,
                "checkpoint": plan.checkpoint,
                "params_type": "DIFF" if "-" in side and sends_change(*side.split("-")) else "FULL",
            },
        }
    command = [sys.executable, "-m", f"benchmarks.{APP.name}.stock", str(plan.settings_file)]
    return {
        "path": "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor",
        "args": {
            "execution_mode": "external_process",
            "command": [*command, str(folder / "stock"), str(plan.num_steps)],
            "params_exchange_format": "pytorch",
            "server_expected_format": "pytorch",
        },
    }


def persistor_of(side: str, plan: Plan) -> dict[str, Any]:
    """The server's persistor: ours, or FLARE's with the module that it needs."""
    if side != "stock":
        path = "nvflare_llm_components.persistors.SafetensorsModelPersistor"
        return {"path": path, "args": {"model_name_or_path": plan.settings["model"]}}
    return {
        "path": "nvflare.app_opt.pt.file_model_persistor.PTFileModelPersistor",
        "args": {
            "model": {
                "path": f"{STOCK_MODEL.stem}.StockModel",
                "args": {"folder": plan.settings["model"]},
            },
            "allow_numpy_conversion": False,
        },
    }


def write_job(side: str, plan: Plan, folder: Path) -> Path:
    """Write one client's FedAvg job; the side is "stock", "messages", or such as "ours-int8"."""
    job = folder / "job"
    (job / "app" / "config").mkdir(parents=True)
    (job / "app" / "custom").mkdir()
    shutil.copy(STOCK_MODEL, job / "app" / "custom")
    fedavg = "nvflare.app_common.workflows.fedavg.FedAvg"
    workflow = {"path": fedavg, "args": {"num_clients": 1, "num_rounds": plan.num_rounds}}
    down, restore, restore_here = precision_filters(*side.split("-")) if "-" in side else ([], [], [])
    server = {
        "format_version": 2,
        "server": {"task_request_interval": 0.5},
        "workflows": [{"id": "fedavg", **workflow}],
        "components": [{"id": "persistor", **persistor_of(side, plan)}],
        "task_data_filters": down,
        "task_result_filters": restore,
    }
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["train"], "executor": executor_of(side, plan, folder)}],
        "components": [],
        "task_data_filters": restore_here,
        "task_result_filters": down,
    }
    for name, config in (("server", server), ("client", client)):
        (job / "app" / "config" / f"config_fed_{name}.json").write_text(json.dumps(config))
    (job / "meta.json").write_text(
        json.dumps({"name": side, "min_clients": 1, "deploy_map": {"app": ["@ALL"]}})
    )
    return job


def job_log(side: str, plan: Plan, folder: Path, limit_s: float) -> str:
    """Simulate one job; return the server's log, empty if it did not complete."""
    folder.mkdir()
    job, workspace = write_job(side, plan, folder), folder / "workspace"
    command = [sys.executable, "-m", "nvflare.cli", "simulator", str(job), "-w", str(workspace)]
    places = {"NVFLARE_LLM_MODEL": plan.settings["model"], "NVFLARE_LLM_DATA": plan.settings["data"]}
    environment = with_recommended(os.environ | places | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    with (folder / "output.txt").open("wb") as output:
        subprocess.run(
            [*command, "-n", "1", "-t", "1"], stdout=output, stderr=output, env=environment, timeout=limit_s
        )
    log = (workspace / "server" / "log.txt").read_text()
    if log.count(SAVED) != plan.num_rounds:
        print(f"  {side} did not complete; see {folder}", flush=True)
        return ""
    return log


def measured_run(side: str, log: str, pure_s: float, num_rounds: int) -> dict[str, Any]:
    """Print one run beside pure training, and return its figures."""
    seconds, (first, *others) = wall_s(log), round_seconds(log)
    later = sum(others) / len(others)
    trained = 0 if side == "messages" else pure_s / num_rounds
    once, each = first - later, later - trained
    print(f"{side:<11}{seconds:>8.1f}{seconds / pure_s:>9.2f}{once:>8.1f}{each:>13.1f}", flush=True)
    return {
        "run": side,
        "seconds": seconds,
        "of_pure": seconds / pure_s,
        "once_s": once,
        "each_round_s": each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=347, help="size of the fp32 model")
    parser.add_argument("--rounds", type=int, default=3, help="two at least: the first costs more")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a round")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="length of a row")
    parser.add_argument("--checkpoint", default="auto", help="our executor's setting")
    parser.add_argument("--runs", default="messages,ours-fp32,ours-int8,stock")
    parser.add_argument("--limit-s", type=float, default=600, help="of one run")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder with its logs")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: expected two at least, to tell the first from the others.")
    scratch = Path(tempfile.mkdtemp(prefix="round_overhead-"))
    settings_file, size = prepare(scratch, args.mib, args.batch_size, args.tokens)
    plan = Plan(settings_file, args.rounds, args.steps, args.checkpoint)
    print(f"model {size / MIB:.0f} MiB fp32, 1 client, {args.rounds} rounds x {args.steps} steps", flush=True)
    pure = pure_seconds(plan, scratch / "pure")
    print(f"{'run':<11}{'seconds':>8}{'of pure':>9}{'once':>8}{'every round':>13}")
    print(f"{'pure':<11}{pure:>8.1f}{1:>9.2f}", flush=True)
    rows: list[dict[str, Any]] = [{"run": "pure", "seconds": pure}]
    for side in args.runs.split(","):
        if log := job_log(side, plan, scratch / side, args.limit_s):
            rows.append(measured_run(side, log, pure, args.rounds))
    record("round_overhead", rows, model_bytes=size, num_rounds=args.rounds, num_steps=args.steps)
    if not args.keep:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
