"""Whether memory stays flat over many rounds: peak of each process in each round, and its slope.

    python -m benchmarks.memory_over_rounds --mib 96 --clients 2,4,8,16

A slope is told with its standard error, over all rounds but the first (--warm-up): over some sixty of them
FLARE's pools of threads fill up, to 256 in a process. Both are in bytes a round and as a share of the model's
size; flat is a slope that is not above zero by more than twice its error.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import numpy as np

from benchmarks.random_model import MIB, config_of_size, save_random_model
from benchmarks.record import record
from benchmarks.round_trip import SAVED, TIME, measure
from nvflare_llm_components.tools.environment import with_recommended

NUM_POINTS = 3  # which a slope with an error needs


def peaks_by_round(trace: list[tuple[float, dict[str, int]]], ends: list[float]) -> dict[str, list[int]]:
    """Peak of each process in each round, in bytes.

    Args:
        trace: samples: time, bytes by process.
        ends: times at which a round's model was saved.
    """
    found: dict[str, list[int]] = {}
    for number, end in enumerate(ends):
        begin = ends[number - 1] if number else float("-inf")
        samples = [sizes for at, sizes in trace if begin < at <= end]
        for role in {role for sizes in samples for role in sizes} - {"gone"}:
            peaks = found.setdefault(role, [0] * len(ends))
            peaks[number] = max(sizes.get(role, 0) for sizes in samples)
    return found


def slope_of(peaks: list[int]) -> tuple[float, float]:
    """Slope of a line through the peaks by least squares, and its standard error, in bytes a round."""
    rounds = np.arange(len(peaks), dtype=float)
    (slope, _), covariance = np.polyfit(rounds, np.asarray(peaks, dtype=float), 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))


def ends_of(log: str) -> list[float]:
    """Times at which the rounds' models were saved, in seconds since the epoch."""
    found = [TIME.match(line) for line in log.splitlines() if SAVED in line]
    return [datetime.strptime(at[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() for at in found if at]


def run(
    model: Path,
    num_clients: int,
    num_rounds: int,
    folder: Path,
    limit_s: float,
    kind: str,
    environment: Mapping[str, str],
    warm_up: int,
) -> list[dict]:
    """One job; a line for each of its processes."""
    folder.mkdir()
    measured = measure(kind, model, num_clients, num_rounds, folder, limit_s, True, environment)
    assert measured.completed, f"{folder}: not completed"
    trace = [(at, sizes) for at, sizes in json.loads((folder / "trace.json").read_text())]
    peaks = peaks_by_round(trace, ends_of((folder / "workspace/server/log.txt").read_text()))
    lines = []
    for role, sizes in sorted(peaks.items()):
        slope, error = slope_of(sizes[warm_up:])
        line = {"clients": num_clients, "process": role, "slope": slope, "error": error, "peak": max(sizes)}
        lines.append(line | {"peaks_mib": [round(size / MIB, 1) for size in sizes]})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=96, help="size of the fp32 model")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=60, help="rounds before those that are looked at")
    parser.add_argument("--clients", default="2", help="numbers of clients, such as 2,4,8,16")
    parser.add_argument("--run", default="ours-int8", help="as in benchmarks.round_trip")
    parser.add_argument("--limit-s", type=float, default=3600, help="of one run")
    parser.add_argument("--environment", choices=["recommended", "plain"], default="recommended")
    args = parser.parse_args()
    environment = with_recommended(os.environ) if args.environment == "recommended" else dict(os.environ)
    if args.rounds < args.warm_up + NUM_POINTS:
        parser.error(
            f"--rounds: expected at least {args.warm_up + NUM_POINTS}, for a slope with its error after "
            f"{args.warm_up}. Found {args.rounds}."
        )
    scratch = Path(tempfile.mkdtemp(prefix="memory_over_rounds-"))
    try:
        size = save_random_model(scratch / "model", config_of_size(args.mib))
        lines = []
        for count in map(int, args.clients.split(",")):
            folder = scratch / str(count)
            found = run(
                scratch / "model",
                count,
                args.rounds,
                folder,
                args.limit_s,
                args.run,
                environment,
                args.warm_up,
            )
            for line in found:
                share, error = line["slope"] / size, line["error"] / size
                flat = "flat" if line["slope"] <= 2 * line["error"] else "NOT FLAT"
                print(
                    f"{count:>3} clients {line['process']:<10} peak {line['peak'] / size:.2f} x model, "
                    f"{share:+.5f} +- {error:.5f} x model a round: {flat}",
                    flush=True,
                )
            lines += found
        record(
            "memory_over_rounds",
            lines,
            model_bytes=size,
            num_rounds=args.rounds,
            warm_up=args.warm_up,
            run=args.run,
            environment=args.environment,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
