"""Memory and time of federated rounds without training: ours beside stock FLARE, in one run.

    python -m benchmarks.round_trip --mib 1152
    python -m benchmarks.round_trip --llama-1b --runs ours-int8

Memory is the peak anonymous resident memory (RssAnon) of a process over the whole run; wall is from the
first task sent to the last model saved, by FLARE's own log. Ratios travel to other machines, seconds do not.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.memory_sampler import MemorySampler
from benchmarks.random_model import MIB, config_of_size, llama_1b_config, save_random_model
from benchmarks.record import record
from benchmarks.round_trip_app.jobs import write_job
from nvflare_llm_components.tools.environment import with_recommended

TIME = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})")
SENT, SAVED = "Sending task train", "End persist model"


@dataclass
class Measured:
    """One run; memory and time as ratios of the model's size and of stock fp32's time are made of these."""

    run: str
    num_clients: int
    completed: bool
    server_bytes: int
    client_bytes: int
    wall_s: float
    sent_bytes: int
    num_samples: int


def measure(
    run: str,
    model: Path,
    num_clients: int,
    num_rounds: int,
    folder: Path,
    limit_s: float,
    keep: bool,
    environment: Mapping[str, str],
) -> Measured:
    """Simulate one job in a process group of its own, sampling it, and clear what it left."""
    job = write_job(folder / "job", run, model, num_clients, num_rounds)
    workspace = folder / "workspace"
    command = [sys.executable, "-m", "nvflare.cli", "simulator", str(job), "-w", str(workspace)]
    command += ["-n", str(num_clients), "-t", str(num_clients)]
    places = {"NVFLARE_LLM_MODEL": str(model)}
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**environment, **places}, start_new_session=True
        )
        with MemorySampler(process.pid) as sampler:
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                print(f"  {run}: stopped after {limit_s:.0f} s", flush=True)
            finally:
                _stop(process)
    (folder / "trace.json").write_text(json.dumps(sampler.trace))
    log = (
        (workspace / "server" / "log.txt").read_text() if (workspace / "server" / "log.txt").exists() else ""
    )
    clients = [size for role, size in sampler.peaks.items() if role not in ("server", "gone")]
    measured = Measured(
        run=run,
        num_clients=num_clients,
        completed=log.count(SAVED) == num_rounds,
        server_bytes=sampler.peaks.get("server", 0),
        client_bytes=max(clients, default=0),
        wall_s=wall_s(log),
        sent_bytes=sent_bytes(workspace),
        num_samples=sampler.num_samples,
    )
    if measured.completed and not keep:
        shutil.rmtree(workspace)
    return measured


def wall_s(log: str) -> float:
    """Seconds from the first task sent to the last model saved."""
    lines = log.splitlines()
    sent = [_time(line) for line in lines if SENT in line]
    saved = [_time(line) for line in lines if SAVED in line]
    return saved[-1] - sent[0] if sent and saved else float("nan")


def round_seconds(log: str) -> list[float]:
    """Seconds of each round, from the end of the one before (of the first: from its task) to its model."""
    lines = log.splitlines()
    sent = next(_time(line) for line in lines if SENT in line)
    saved = [_time(line) for line in lines if SAVED in line]
    return [end - begin for begin, end in zip([sent, *saved], saved, strict=False)]


def sent_bytes(workspace: Path) -> int:
    """Size of one encoded message, by the filters' own ledger; 0 where no filter of ours ran."""
    ledger = workspace / "server" / "simulate_job" / "traffic.jsonl"
    if not ledger.exists():
        return 0
    return int(json.loads(ledger.read_text().splitlines()[0])["bytes_after"])


def _time(line: str) -> float:
    found = TIME.match(line)
    return datetime.strptime(found.group(1), "%Y-%m-%d %H:%M:%S,%f").timestamp() if found else float("nan")


def _stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def print_table(results: list[Measured], model_bytes: int) -> None:
    """Print one line a run."""
    stock = next((m.wall_s for m in results if m.run == "stock-fp32" and m.completed), float("nan"))
    print(f"\nmodel {model_bytes / MIB:.0f} MiB fp32 ({model_bytes:,} bytes); memory as a multiple of it")
    print(f"{'run':<12}{'clients':>8}{'server':>9}{'client':>9}{'wall s':>9}{'of stock':>10}{'message':>16}")
    for m in results:
        server, client = (f"{size / model_bytes:.2f} x" for size in (m.server_bytes, m.client_bytes))
        ratio = f"{m.wall_s / stock:.2f}"
        note = "" if m.completed else "  NOT COMPLETED"
        print(
            f"{m.run:<12}{m.num_clients:>8}{server:>9}{client:>9}{m.wall_s:>9.1f}{ratio:>10}{m.sent_bytes:>16,}{note}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1152, help="size of the fp32 model")
    parser.add_argument("--llama-1b", action="store_true", help="Llama-3.2-1B's shapes instead of --mib")
    parser.add_argument("--clients", default="2", help="numbers of clients, such as 2,4,8")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--runs",
        default="stock-fp32,stock-fp16,ours-fp32,ours-fp16,ours-int8",
        help="in this order; one may come twice",
    )
    parser.add_argument("--limit-s", type=float, default=300, help="of one run")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder with logs and traces")
    parser.add_argument(
        "--environment",
        choices=["recommended", "plain"],
        default="recommended",
        help="README's variables for stock and ours alike, or only those that are set already",
    )
    args = parser.parse_args()
    environment = with_recommended(os.environ) if args.environment == "recommended" else dict(os.environ)
    scratch = Path(tempfile.mkdtemp(prefix="round_trip-"))
    try:
        config = llama_1b_config() if args.llama_1b else config_of_size(args.mib)
        print("writing a random model ...", flush=True)
        model_bytes = save_random_model(scratch / "model", config)
        results = []
        for num_clients in map(int, args.clients.split(",")):
            for number, run in enumerate(args.runs.split(",")):
                folder = scratch / f"{run}-{num_clients}-{number}"
                folder.mkdir()
                begin = time.time()
                print(f"{run}, {num_clients} clients ...", flush=True)
                results.append(
                    measure(
                        run,
                        scratch / "model",
                        num_clients,
                        args.rounds,
                        folder,
                        args.limit_s,
                        args.keep,
                        environment,
                    )
                )
                print(f"  {time.time() - begin:.0f} s: {results[-1]}", flush=True)
        print_table(results, model_bytes)
        record(
            "round_trip",
            map(asdict, results),
            model_bytes=model_bytes,
            num_rounds=args.rounds,
            environment=args.environment,
        )
    finally:
        if args.keep:
            print(f"kept {scratch}")
        else:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
