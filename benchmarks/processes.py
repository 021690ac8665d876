"""Several processes a site beside one: peak memory of each, and seconds of a round.

    python -m benchmarks.processes --mib 320

Cases: one process as ever; a front end with one process; with two that hold the whole model (DDP); with two
that hold a half (FSDP2). Memory is anonymous resident memory; what a process has before there is a model is
told by the same case with a tiny one, and `told` is what `nvflare-llm sizes --memory` says of the rest. A
front end's image of the weights is no process's: `image` is how much the machine's shared memory grew.
Seconds mean something on a quiet machine only (`--memory` leaves them out of the record).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_sampler import MemorySampler
from benchmarks.random_model import MIB
from benchmarks.record import record
from benchmarks.round_overhead import ROOT, prepare

CASES = {"one": (1, "none"), "front end, one": (1, "none"), "two": (2, "none"), "two, full": (2, "full")}
TINY_MIB = 1
GIVES_BACK = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"}


def engine_of(case: str, settings_file: Path, folder: Path) -> Any:
    """What trains in a case."""
    from nvflare_llm_components.training.engine import TrainingEngine
    from nvflare_llm_components.training.ranks import Ranks
    from nvflare_llm_components.training.settings import TrainingSettings

    plan, (num_processes, sharding) = json.loads(settings_file.read_text()), CASES[case]
    settings = TrainingSettings(
        model_name_or_path=plan["model"],
        train_data=Path(plan["data"]),
        sft_config=plan["sft"] | {"use_cpu": True},
        num_processes=num_processes,
        sharding=sharding,
        local_steps=1,
    ).checked()
    folder.mkdir(parents=True)
    return TrainingEngine(settings, folder, None) if case == "one" else Ranks(settings, folder, folder, None)


def trained(
    case: str, settings_file: Path, folder: Path, num_rounds: int, num_steps: int
) -> dict[str, float]:
    """Train some rounds; the median seconds of what each consists of."""
    from nvflare_llm_components.training.engine import RoundOrder
    from nvflare_llm_components.training.worker import Worker

    engine, horizon = engine_of(case, settings_file, folder), num_rounds * num_steps
    worker = Worker(lambda: engine.run(horizon, 0, worker.park))
    worker.start()
    seconds: dict[str, list[float]] = {"load_s": [], "train_s": [], "snapshot_s": []}

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        started = time.monotonic()
        found = call(*arguments)
        seconds[name].append(time.monotonic() - started)
        return found

    weights = worker.call(engine.snapshot)
    for number in range(num_rounds):
        timed("load_s", worker.call, partial(engine.load, weights))
        engine.order = RoundOrder(boundary=(number + 1) * num_steps, horizon=horizon)
        timed("train_s", worker.advance)
        weights = timed("snapshot_s", worker.call, engine.snapshot)
    worker.stop(60)
    engine.close()
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}


def role_of(pid: int) -> str:
    """Which rank a process is, by its environment; all others are the front end."""
    try:
        if b"training.rank" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
            return f"rank {found[1].decode()}" if found else "front end"
    except OSError:
        return "gone"
    return "front end"


def shared_bytes() -> int:
    """The machine's shared memory, in which images are."""
    found = re.search(r"Shmem:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def measured(case: str, settings_file: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes by process, and seconds by phase."""
    before, peaks, is_over = shared_bytes(), [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            peaks.append(max(peaks.pop(), shared_bytes() - before))

    command = [sys.executable, "-m", "benchmarks.processes", "--case", case]
    command += ["--settings", str(settings_file), "--folder", str(folder)]
    command += ["--rounds", str(options.rounds), "--steps", str(options.steps)]
    watcher = threading.Thread(target=watch)
    watcher.start()
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (GIVES_BACK if options.memory else {})
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=variables) as process,
        MemorySampler(process.pid, role_of) as sampler,
    ):
        output, _ = process.communicate()
    is_over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{case}: ended with {process.returncode}")
    sampler.peaks.pop("gone", None)
    return {"peak_bytes": sampler.peaks, "image_bytes": peaks[0], **json.loads(output.splitlines()[-1])}


def told(case: str, model: Path, rows: int, tokens: int) -> int:
    """What `sizes --memory` says of each process of a case."""
    from nvflare_llm_components.tensors.names import meta_model
    from nvflare_llm_components.training.step_memory import step_memory

    num_processes, sharding = CASES[case]
    built = meta_model(str(model)).to(torch.float32)
    return step_memory(built, rows, tokens, num_processes=num_processes, sharding=sharding).total


def show(row: dict[str, Any]) -> None:
    """Print one case."""
    for role, peak in sorted(row["peak_bytes"].items()):
        above = f"{row['above_tiny_bytes'][role] / MIB:8.0f} for the model"
        of_told = f"{row['told_bytes'] / MIB:8.0f} told" if role == row["trains"] else ""
        print(f"{row['case']:15}{role:10}{peak / MIB:8.0f} MiB{above}{of_told}", flush=True)
    seconds = ", ".join(
        f"{name} {row[name]:.2f}" for name in ("load_s", "train_s", "snapshot_s") if name in row
    )
    print(f"{row['case']:15}image {row['image_bytes'] / MIB:.0f} MiB   {seconds}", flush=True)


def main() -> None:
    """Measure each case beside its like with a tiny model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=320, help="size of the fp32 model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps a round")
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--memory", action="store_true", help="glibc gives buffers back; no seconds")
    parser.add_argument("--cases", default=";".join(CASES))
    for name in ("--case", "--settings", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        places = Path(options.settings), Path(options.folder)
        print(json.dumps(trained(options.case, *places, options.rounds, options.steps)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="processes-") as scratch:
        tiny, _ = prepare(Path(scratch, "tiny"), TINY_MIB, options.rows, options.tokens)
        large, size = prepare(Path(scratch, "large"), options.mib, options.rows, options.tokens)
        for number, case in enumerate(options.cases.split(";")):
            base = measured(case, tiny, Path(scratch, f"tiny-{number}"), options)["peak_bytes"]
            row = {"case": case, **measured(case, large, Path(scratch, f"large-{number}"), options)}
            row["above_tiny_bytes"] = {role: peak - base[role] for role, peak in row["peak_bytes"].items()}
            row["trains"] = "front end" if case == "one" else "rank 0"
            row["told_bytes"] = told(case, large.parent / "model", options.rows, options.tokens)
            if options.memory:
                row = {name: value for name, value in row.items() if not name.endswith("_s")}
            rows.append(row)
            show(row)
    conditions = {"model_bytes": size, "rows_of_a_step": options.rows, "tokens": options.tokens}
    print(record("processes", rows, **conditions, num_steps=options.steps, memory_only=options.memory))


if __name__ == "__main__":
    main()
