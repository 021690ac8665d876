"""What federating is worth: SmolLM2-135M-Instruct, LoRA, three sites' real rows, loss on held-out rows.

    python -m benchmarks.evidence --raw ../shared/data
    python -m benchmarks.evidence --raw ../shared/data --model FOLDER --seeds 1 --rounds 1     (smoke)

Rows: the base, each site alone, the ways to federate, and all rows in one place. Cells that are done are
kept in benchmarks/results/evidence.jsonl and are not run again; a whole table is recorded in
benchmarks/records/evidence.jsonl. Every seed draws another adapter to start from and another order of rows;
what is held out stays. Nothing is tuned: all rows have one learning rate.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.convergence import ENVIRONMENT, RESULTS, read_done
from benchmarks.evidence_cell import (
    BATCH_SIZE,
    LEARNING_RATE,
    POOLED,
    SITES,
    Plan,
    run_trial,
)
from benchmarks.federated_cell import Scale, Way
from benchmarks.record import record

CHANGES = Way("changes", "fp32", "fp32", "DIFF")
ANSWER_LENGTH = 32
FEDADAM = (("lr", 2e-3), ("betas", (0.9, 0.99)), ("eps", 1e-3))
NESTEROV = (("lr", 1.0), ("momentum", 0.6), ("nesterov", True))
FIRST = [
    Plan("base", ()),
    *[Plan(f"{site} alone", (site,)) for site in SITES],
    Plan("FedAvg", SITES),
]
PLANS = [
    Plan("FedAvg, int8", SITES, Way("int8", "int8", "int8", "DIFF")),
    Plan("FedAvg, nf4", SITES, Way("nf4", "nf4", "nf4", "DIFF", error_feedback=True)),
    Plan("FedProx", SITES, Way("fp32", "fp32", "fp32", proximal_mu=0.1)),
    Plan("FedAdam", SITES, CHANGES, "Adam", FEDADAM),
    Plan("all rows in one place", (POOLED,)),
]
LAST = [
    Plan("FedAvg, int2", SITES, Way("int2", "int2", "int2", "DIFF", error_feedback=True)),
    Plan("Nesterov", SITES, CHANGES, "SGD", NESTEROV),
]
ALL = [*FIRST, *PLANS, *LAST]
Row = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Model and rows: rows, cut at so many tokens, as many held out at every site."""

    model: Path
    data: Path
    max_length: int
    eval_rows: int


def prepare_inputs(raw: Path, folder: Path, model: Path | None, max_length: int, eval_rows: int) -> Inputs:
    """Makes what is missing: the model's folder, and the sites' rows in its chat template."""
    from transformers import AutoTokenizer

    from nvflare_llm_components.data.prepare import prepare
    from nvflare_llm_components.data.records import read_records, write_jsonl
    from nvflare_llm_components.data.smollm2 import save_smollm2
    from nvflare_llm_components.tools.demo import raw_files

    model = model or save_smollm2(folder / "model")
    data = folder / f"data-{max_length}-{eval_rows}"
    tokenizer = AutoTokenizer.from_pretrained(model)
    pooled: list[Row] = []
    for site in SITES:
        whole = folder / "whole" / site
        prepare(site, raw_files(raw)[site], whole, validation_fraction=0.2, test_fraction=0, chat=True)
        files = {name: read_records(whole / f"{name}.jsonl") for name in ("training", "validation")}
        short = {name: [row for row in rows if _fits(tokenizer, row, max_length)]
                 for name, rows in files.items()}  # fmt: skip
        held_out = short["validation"][:eval_rows]
        if len(held_out) < eval_rows:
            raise SystemExit(
                f"{site}: expected {eval_rows} held-out rows with so short questions. Found {len(held_out)}."
            )
        write_jsonl(data / site / "training.jsonl", short["training"])
        write_jsonl(data / site / "validation.jsonl", held_out)
        pooled += short["training"]
    write_jsonl(data / POOLED / "training.jsonl", pooled)
    write_jsonl(data / POOLED / "validation.jsonl", held_out)
    return Inputs(model, data, max_length, eval_rows)


def _fits(tokenizer: Any, row: Row, max_length: int) -> bool:
    """Whether the question leaves so many tokens to the answer; the rest of the answer is cut."""
    asked = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    return len(tokenizer(asked)["input_ids"]) <= max_length - ANSWER_LENGTH


def cells(num_seeds: int) -> Iterator[tuple[Plan, int]]:
    """What answers most comes first, for all seeds. The base has nothing drawn."""
    for plans in (FIRST, PLANS, LAST):
        for seed in range(num_seeds):
            yield from ((plan, seed) for plan in plans if plan.trained_at or seed == 0)


def key_of(plan: Plan, seed: int, scale: Scale, inputs: Inputs) -> Row:
    held = {"max_length": inputs.max_length, "eval_rows": inputs.eval_rows}
    return {"plan": plan.name, "seed": seed, **asdict(scale), **held}


def done_of(file: Path, wanted: list[Row]) -> list[Row]:
    """The cells that are done, in the order wanted."""
    done = {json.dumps({name: row[name] for name in wanted[0]}): row for row in read_done(file)}
    return [done[key] for key in map(json.dumps, wanted) if key in done]


def run_missing(file: Path, num_seeds: int, scale: Scale, inputs: Inputs, num_workers: int) -> None:
    """Run what is not in the file yet."""
    wanted = [(key_of(*cell, scale, inputs), cell) for cell in cells(num_seeds)]
    missing = [(key, cell) for key, cell in wanted if not done_of(file, [key])]
    os.environ |= ENVIRONMENT
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"))
    with pool, Progress() as progress:
        bar = progress.add_task("cells", total=len(missing))
        futures = {
            pool.submit(run_trial, *cell, scale, inputs.max_length, inputs.model, inputs.data): key
            for key, cell in missing
        }
        for future in as_completed(futures):
            with file.open("a") as results:
                results.write(json.dumps(futures[future] | asdict(future.result())) + "\n")
            progress.advance(bar)


def summarize(rows: list[Row]) -> list[Row]:
    """A line for each plan; differences to FedAvg are those of the same seed."""
    own = {plan.name: {row["seed"]: row for row in rows if row["plan"] == plan.name} for plan in ALL}
    fedavg = {seed: union(row) for seed, row in own["FedAvg"].items()}
    return [_line(plan, own[plan.name], fedavg) for plan in ALL if own[plan.name]]


def _line(plan: Plan, own: dict[int, Row], fedavg: dict[int, float]) -> Row:
    unions = {seed: union(row) for seed, row in own.items()}
    paired = {seed: seed if plan.trained_at else 0 for seed in fedavg}
    pairs = [unions[mine] - fedavg[seed] for seed, mine in paired.items() if mine in unions]
    sent = [row["bytes_down"] + row["bytes_up"] for row in own.values()]
    return {
        "name": plan.name,
        "num_seeds": len(own),
        **{site: statistics.mean(row["losses"][site] for row in own.values()) for site in SITES},
        "union": statistics.mean(unions.values()),
        "spread": statistics.stdev(unions.values()) if len(unions) > 1 else 0.0,
        "over_fedavg": statistics.mean(pairs),
        "over_fedavg_range": [min(pairs), max(pairs)],
        "bytes": sum(sent) // len(sent) if plan.trained_at == SITES else 0,
    }


def union(row: Row) -> float:
    """All sites hold out as many rows, so that the mean over rows is the mean over sites."""
    return statistics.mean(row["losses"].values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw", type=Path, required=True, help="folder of the published files")
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2 from the package index")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=80, help="tokens a row; longer ones are cut")
    parser.add_argument("--eval-rows", type=int, default=12, help="held-out rows a site")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--record-only", action="store_true", help="run no cell; record what is done")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder, file = options.out / "evidence", options.out / "evidence.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    inputs = prepare_inputs(options.raw, folder, options.model, options.max_length, options.eval_rows)
    scale = Scale(options.rounds, options.local_steps)
    if not options.record_only:
        run_missing(file, options.seeds, scale, inputs, options.workers)
    done = done_of(file, [key_of(*cell, scale, inputs) for cell in cells(options.seeds)])
    lines = summarize(done)
    Console(width=130).print_json(json.dumps(lines))
    conditions = {"batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, **asdict(scale)}
    held = {"max_length": inputs.max_length, "eval_rows": inputs.eval_rows}
    record("evidence", lines, sites=SITES, **conditions, **held, cells=done)


if __name__ == "__main__":
    main()
