"""Final eval loss and bytes by message precision: same data, same seeds, three sites, SFT and LoRA.

    python -m benchmarks.convergence --raw ../shared/data
    python -m benchmarks.convergence --seeds 1 --rounds 2 --local-steps 2     (smoke)
    python -m benchmarks.convergence --table sparsity --modes sft --rounds 100 --local-steps 10
    python -m benchmarks.convergence --table changes --modes sft --rounds 10 --local-steps 1
    python -m benchmarks.convergence --table pretrained --raw FOLDER --rounds 10 --local-steps 2 --seeds 1

Cells that are done are kept in benchmarks/results/convergence.jsonl and are not run again; a whole table is
recorded in benchmarks/records/convergence.jsonl.
Losses are paired by seed: what counts is a cell's difference to fp32 with the same seed.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.federated_cell import LEARNING_RATES, Outcome, Scale, Way, run_cell
from benchmarks.record import record

RESULTS = Path(__file__).parent / "results"
SITES = ["dolly", "alpaca", "oasst1"]
MODES = ["sft", "lora"]
WAYS = [
    Way("fp32", "fp32", "fp32"),
    Way("bf16", "bf16", "bf16", "DIFF"),
    Way("int8", "int8", "int8", "DIFF"),
    Way("nf4 both, feedback", "nf4", "nf4", "DIFF", error_feedback=True),
    Way("int2 both, feedback", "int2", "int2", "DIFF", error_feedback=True),
    Way("one bit up, feedback", "bf16", "one bit", "DIFF", error_feedback=True),
    Way("largest 5 % up, feedback", "bf16", "largest 5 %", "DIFF", error_feedback=True),
]
MOMENTUM = {"momentum": 0.5, "server_rate": 0.7}
SPARSITY = [
    Way("fp32", "fp32", "fp32"),
    Way("fp32, momentum", "fp32", "all", "DIFF", **MOMENTUM),
    Way("int2 up, feedback", "fp32", "int2", "DIFF", error_feedback=True),
    Way("largest 5 % up", "fp32", "largest 5 %", "DIFF"),
    Way("largest 5 % up, momentum", "fp32", "largest 5 %", "DIFF", **MOMENTUM),
    Way("largest 1 % up", "fp32", "largest 1 %", "DIFF"),
    Way("largest 1 % up, momentum", "fp32", "largest 1 %", "DIFF", **MOMENTUM),
]
PRETRAINED = [way for way in WAYS if way.name in ("fp32", "int8", "int2 both, feedback")]
CHANGES = [
    way
    for precision in ("fp32", "bf16", "int8")
    for way in (
        Way(precision, precision, precision),
        Way(f"{precision}, changes", precision, precision, "DIFF"),
    )
]
TABLES = {"convergence": WAYS, "sparsity": SPARSITY, "pretrained": PRETRAINED, "changes": CHANGES}
SMALL_RATES = {"sft": 5e-5, "lora": 1e-3}  # of a pretrained model
TARGETS = {"int8": 0.002, "nf4 both, feedback": 0.01, "int2 both, feedback": 0.01}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
Record = dict[str, Any]


def prepare_inputs(raw: Path | None, folder: Path, num_steps: int, max_eval_rows: int) -> tuple[Path, Path]:
    """The base model and the sites' data, made once; returns their folders."""
    from nvflare_llm_components.data.demo_model import save_base_model
    from nvflare_llm_components.data.demo_sets import write_raw_sets
    from nvflare_llm_components.data.prepare import prepare
    from nvflare_llm_components.data.records import read_records
    from nvflare_llm_components.tools.demo import raw_files

    model, data = folder / "model", folder / "data"
    if (model / "config.json").is_file():
        return model, data
    if raw:
        files = raw_files(raw)
    else:
        files = {name: [file] for name, file in write_raw_sets(folder / "raw", num_rows=300).items()}
    prompts: list[str] = []
    for site in SITES:
        prepare(site, files[site], data / site)
        prompts += [row["input"] for row in read_records(data / site / "training.jsonl")]
        shorten(data / site / "validation.jsonl", max_eval_rows)
    save_base_model(model, prompts, vocab_size=2048, hidden_size=128, num_layers=3, num_steps=num_steps)
    return model, data


def pretrained_inputs(raw: Path | None, folder: Path, num_eval_rows: int) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct and the sites' rows in its chat template, of at most 80 tokens."""
    from benchmarks.evidence import prepare_inputs as evidence_inputs

    if raw is None:
        raise SystemExit("--table pretrained: expected the published files. Give their folder as --raw.")
    inputs = evidence_inputs(raw, folder, None, 80, num_eval_rows)
    return inputs.model, inputs.data


def shorten(file: Path, num_rows: int) -> None:
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:num_rows]))


def cells(ways: list[Way], modes: list[str], num_seeds: int) -> Iterator[tuple[str, Way, int]]:
    for seed in range(num_seeds):
        for mode in modes:
            for way in ways:
                yield mode, way, seed


def key_of(mode: str, way: Way, seed: int, scale: Scale) -> Record:
    return {"mode": mode, "way": way.name, "seed": seed, **asdict(scale)}


def read_done(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def run_missing(
    file: Path,
    wanted: Iterable[tuple[str, Way, int]],
    scale: Scale,
    model: Path,
    data: Path,
    rates: dict[str, float],
    num_workers: int,
) -> None:
    """Run what is not in the file yet, several cells at a time with one thread each."""
    done = [
        {key: record[key] for key in ("mode", "way", "seed", *asdict(scale))} for record in read_done(file)
    ]
    missing = [cell for cell in wanted if key_of(*cell, scale) not in done]
    os.environ |= ENVIRONMENT
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"))
    with pool, Progress() as progress:
        bar = progress.add_task("cells", total=len(missing))
        futures = {
            pool.submit(run_cell, mode, way, seed, scale, model, data, SITES, rates): key_of(
                mode, way, seed, scale
            )
            for mode, way, seed in missing
        }
        for future in as_completed(futures):
            outcome: Outcome = future.result()
            with file.open("a") as results:
                results.write(json.dumps(futures[future] | asdict(outcome)) + "\n")
            progress.advance(bar)


def summarize(records: list[Record], ways: list[Way]) -> list[Record]:
    """One line for each mode and way: losses over seeds, paired with fp32 of the same seed, and bytes."""
    found = {(r["mode"], r["way"], r["seed"]): r for r in records}
    lines = []
    for mode in MODES:
        for way in ways:
            seeds = sorted(s for m, w, s in found if (m, w) == (mode, way.name) and (m, "fp32", s) in found)
            if seeds:
                lines.append(_line(mode, way.name, [found[mode, way.name, s] for s in seeds],
                                   [found[mode, "fp32", s] for s in seeds]))  # fmt: skip
    return lines


def _line(mode: str, way: str, own: list[Record], base: list[Record]) -> Record:
    final, best = ([kind(record["eval_losses"]) for record in own] for kind in (_last, min))
    total, full = (sum(r["bytes_down"] + r["bytes_up"] for r in records) for records in (own, base))
    return {
        "mode": mode,
        "way": way,
        "num_seeds": len(own),
        "initial": statistics.mean(record["eval_losses"][0] for record in own),
        "final": statistics.mean(final),
        "spread": _spread(final),
        **_against("excess", final, [_last(record["eval_losses"]) for record in base]),
        "best": statistics.mean(best),
        "best_spread": _spread(best),
        **_against("best_excess", best, [min(record["eval_losses"]) for record in base]),
        "bytes_to_reach": _bytes_to_reach(own, base),
        "bytes": total // len(own),
        "ratio": total / full,
        "curve": [statistics.mean(losses) for losses in zip(*(r["eval_losses"] for r in own), strict=True)],
    }


def _last(losses: list[float]) -> float:
    return losses[-1]


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _against(name: str, own: list[float], base: list[float]) -> Record:
    """Mean and spread of what a loss is above that of fp32 with the same seed, as a share of it."""
    excess = [one / other - 1 for one, other in zip(own, base, strict=True)]
    return {name: statistics.mean(excess), f"{name}_spread": _spread(excess)}


def _bytes_to_reach(own: list[Record], base: list[Record]) -> int | None:
    """Mean bytes until the loss is within 1 % of fp32's best; None where a seed never is."""
    spent = []
    for one, other in zip(own, base, strict=True):
        goal, losses = 1.01 * min(other["eval_losses"]), one["eval_losses"]
        rounds = next((number for number, loss in enumerate(losses) if loss <= goal), None)
        if rounds is None:
            return None
        spent.append((one["bytes_down"] + one["bytes_up"]) * rounds / (len(losses) - 1))
    return round(statistics.mean(spent))


def show(lines: list[Record], console: Console) -> None:
    table = Table(title="Eval loss of the global model, mean over three sites, and bytes of the whole run")
    for name in (
        "mode",
        "messages",
        "seeds",
        "before",
        "best",
        "at the end",
        "± over seeds",
        "best against fp32",
        "bytes",
        "of fp32",
    ):
        table.add_column(name, justify="left" if name in ("mode", "messages") else "right")
    for line in lines:
        losses = (f"{line[name]:.4f}" for name in ("initial", "best", "final", "spread"))
        sizes = f"{line['best_excess']:+.3%}", f"{line['bytes']:,}", f"{line['ratio']:.4f}"
        table.add_row(line["mode"], line["way"], str(line["num_seeds"]), *losses, *sizes)
    console.print(table)
    for line in lines:
        target = TARGETS.get(line["way"])
        if target is not None:
            verdict = "reached" if abs(line["best_excess"]) <= target else "MISSED "
            name = f"{line['mode']} {line['way']}"
            console.print(
                f"{verdict}  {name}: {line['best_excess']:+.3%} of fp32 (target within {target:.1%})"
            )


def draw(lines: list[Record], file: Path) -> None:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axis, mode in zip(figure.subplots(1, len(MODES)), MODES, strict=True):
        for line in (line for line in lines if line["mode"] == mode):
            axis.plot(line["curve"], marker=".", label=f"{line['way']} ({line['ratio']:.3f} of the bytes)")
        axis.set(title=mode, xlabel="round", ylabel="eval loss of the global model")
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw", type=Path, help="folder of the published files; generated sets without it")
    parser.add_argument("--table", choices=TABLES, default="convergence")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--local-steps", type=int, default=8)
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--eval-rows", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    inputs = options.out / "convergence"
    inputs.mkdir(parents=True, exist_ok=True)
    default_raw = Path("../shared/data")
    raw = options.raw or (default_raw if default_raw.is_dir() else None)
    if options.table == "pretrained":
        model, data = pretrained_inputs(raw, inputs / "pretrained", options.eval_rows)
    else:
        model, data = prepare_inputs(raw, inputs, options.base_steps, options.eval_rows)
    rates = SMALL_RATES if options.table in ("pretrained", "changes") else LEARNING_RATES
    file, ways = options.out / f"{options.table}.jsonl", TABLES[options.table]
    scale = Scale(options.rounds, options.local_steps)
    wanted = cells(ways, options.modes, options.seeds)
    run_missing(file, wanted, scale, model, data, rates, options.workers)
    cells_done = [
        r
        for r in read_done(file)
        if (r["num_rounds"], r["local_steps"]) == (options.rounds, options.local_steps)
    ]
    lines = summarize(cells_done, ways)
    show(lines, Console(width=130))
    draw(lines, options.out / f"{options.table}.png")
    record(options.table, lines, cells=cells_done, data="real rows" if raw else "generated rows")


if __name__ == "__main__":
    main()
