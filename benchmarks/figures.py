"""The tables of figures in README and docs, made from the last record of each benchmark.

python -m benchmarks.figures            print them
python -m benchmarks.figures --write    put each into its page, between its two marks
"""

import argparse
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import records

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- figures: python -m benchmarks.figures --write -->", "<!-- end of figures -->"
Rows = dict[str, dict[str, Any]]
Line = tuple[str, str, str]


def latest(benchmark: str, key: str, **conditions: Any) -> tuple[dict[str, Any], Rows] | None:
    """The last record of a benchmark under these conditions, and its rows by one of their fields."""
    found = [run for run in records(benchmark) if conditions.items() <= run.items()]
    return (found[-1], {str(row[key]): row for row in found[-1]["rows"]}) if found else None


def codecs() -> Iterator[Line]:
    """Speed and error of the codecs beside bitsandbytes and stock FLARE."""
    found = latest("codecs", "name", device="cpu")
    if not found:
        return
    rows = found[1]
    peers = {"int8": "bitsandbytes int8", "nf4": "bitsandbytes nf4", "fp16": "stock float16, torch"}
    for row in rows.values():
        name = re.fullmatch(r"ours (\w+)", str(row["name"]))
        if name and name[1] != "bf16":
            peer = rows.get(peers.get(name[1], ""))
            yield f"encode and decode {name[1]}", _codec(peer) if peer else "", _codec(row)


def _codec(row: dict[str, Any]) -> str:
    speeds = f"{row['encode_gb_s']:.2f} and {row['decode_gb_s']:.2f} GB/s"
    return f"{speeds}, error {row['relative_error']:.4f}, {row['bits_a_weight']:.2f} bits a weight"


def round_trip() -> Iterator[Line]:
    """Memory and wall of rounds without training, beside stock FLARE."""
    found = latest("round_trip", "run", environment="recommended")
    if not found or "stock-fp32" not in found[1]:
        return
    run, rows = found
    walls: dict[str, list[float]] = {name: [] for name in rows}
    for row in run["rows"]:
        walls[row["run"]].append(row["wall_s"])
    size, stock = run["model_bytes"], rows["stock-fp32"]
    stock_s = statistics.median(walls["stock-fp32"])
    what = f"{size / 2**20:.0f} MiB model, {stock['num_clients']} clients"
    for name, row in rows.items():
        if not name.startswith("ours"):
            continue
        wire = name.removeprefix("ours-")
        server, client = row["server_bytes"] / size, row["client_bytes"] / size
        peers = stock["server_bytes"] / size, stock["client_bytes"] / size
        yield f"server's peak memory, {what}, {wire}", f"{peers[0]:.2f} x the model", f"{server:.2f} x"
        yield f"client's peak memory, same, {wire}", f"{peers[1]:.2f} x", f"{client:.2f} x"
        wall = f"{_spread(walls[name])} ({statistics.median(walls[name]) / stock_s:.2f} x)"
        yield f"wall of {run['num_rounds']} such rounds, {wire}", _spread(walls["stock-fp32"]), wall


def _spread(seconds: list[float]) -> str:
    """The median, and how far one run lay from another."""
    if len(seconds) == 1:
        return f"{seconds[0]:.1f} s"
    return f"{statistics.median(seconds):.1f} s ({min(seconds):.1f}-{max(seconds):.1f}, {len(seconds)} runs)"


def round_overhead() -> Iterator[Line]:
    """A job's time over its training alone, by the length of rounds; beside flare.patch where that ran."""
    for run in _overheads():
        rows = {row["run"]: row for row in run["rows"]}
        size = f"{run['model_bytes'] / 2**20:.0f} MiB"
        what = f"{run['num_rounds']} rounds of {run['num_steps']} steps of a {size} model"
        ours = ", ".join(
            f"{row['of_pure']:.2f} x {name.removeprefix('ours-')}"
            for name, row in rows.items()
            if name.startswith("ours")
        )
        yield (
            f"{what}, over training alone ({rows['pure']['seconds']:.1f} s)",
            f"stock `flare.patch` {rows['stock']['of_pure']:.2f} x" if "stock" in rows else "",
            f"{ours}; {rows['messages']['of_pure']:.2f} x is FLARE's messages alone",
        )


def _overheads() -> list[dict[str, Any]]:
    """The latest run of each length of rounds."""
    latest_of = {run["num_steps"]: run for run in records("round_overhead")}
    return [run for _, run in sorted(latest_of.items())]


def table() -> str:
    """The table in Markdown, with the dates and commits of its records."""
    lines = ["| what | peer | ours |", "|---|---|---|"]
    for part in (codecs, round_trip, round_overhead):
        lines += [f"| {what} | {peer} | {ours} |" for what, peer, ours in part()]
    return "\n".join([*lines, "", _origin("codecs", "round_trip", also=_overheads())])


def _origin(*benchmarks: str, also: Sequence[dict[str, Any]] = ()) -> str:
    runs = [*(records(name)[-1] for name in benchmarks if records(name)), *also]
    told = "; ".join(f"`{run['command']}`, {run['date'][:10]}, commit {run['commit'][:7]}" for run in runs)
    return f"From `benchmarks/records/`: {told}."


def precisions() -> str:
    """What each precision costs: bytes, rounding error, speed, and loss where it was recorded."""
    found = latest("codecs", "name", device="cpu")
    rows = found[1] if found else {}
    lines = [
        "| precision | bits a weight | of fp32 | relative error | encode, decode |",
        "|---|---|---|---|---|",
    ]
    for name in ("fp16", "bf16", "int8", "nf4", "int2"):
        if row := rows.get(f"ours {name}"):
            bits, speeds = row["bits_a_weight"], f"{row['encode_gb_s']:.1f}, {row['decode_gb_s']:.1f} GB/s"
            cells = f"{bits:.2f} | {bits / 32:.1%} | {row['relative_error']:.4f} | {speeds}"
            lines.append(f"| `{name}` | {cells} |")
    return "\n".join([*lines, *_losses(), "", _origin("codecs", "convergence")])


def _losses() -> list[str]:
    """Final loss against fp32 messages with the same seeds, for all weights and for LoRA."""
    found = [run for run in records("convergence") if any(row["num_seeds"] > 1 for row in run["rows"])]
    if not found:
        return []
    rows = {(row["mode"], row["way"]): row for row in found[-1]["rows"]}
    seeds = next(iter(rows.values()))["num_seeds"]
    columns = [f"{mode}: best loss | at the end | to fp32 + 1 %" for mode in ("all weights", "LoRA")]
    lines = ["", f"| messages ({seeds} seeds) | bytes | {' | '.join(columns)} |", "|---" * 8 + "|"]
    for way in dict.fromkeys(way for _, way in rows):
        cells = [_loss(rows.get((mode, way))) for mode in ("sft", "lora")]
        ratio = next(row["ratio"] for (_, name), row in rows.items() if name == way)
        lines.append(f"| {way} | {ratio:.1%} | {' | '.join(cells)} |")
    return lines


def _loss(row: dict[str, Any] | None) -> str:
    """Three cells: the best loss of a run and that of its end, against fp32; the bytes to fp32's + 1 %."""
    if not row:
        return " |  | "
    kinds = (("best", "best_excess"), ("final", "excess"))
    losses = [f"{row[name]:.4f} ({row[over]:+.2%} ± {row[f'{over}_spread']:.2%})" for name, over in kinds]
    reached = row["bytes_to_reach"]
    return " | ".join([*losses, "not reached" if reached is None else f"{reached / 1e6:.1f} MB"])


def evidence() -> str:
    """What federating is worth: loss on held-out rows of each site, alone, federated and in one place."""
    found = latest("evidence", "name")
    if not found:
        return "No run is recorded yet: `python -m benchmarks.evidence --raw FOLDER`."
    run, rows = found
    sites = [name for name in next(iter(rows.values())) if name in run["sites"]]
    names = ["trained", "seeds", *sites, "all", "±", "of FedAvg, same seed", "bytes, whole run"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, row in rows.items():
        losses = [f"{row[site]:.3f}" for site in (*sites, "union")]
        least, most = row["over_fedavg_range"]
        beside = f"{row['over_fedavg']:+.3f} ({least:+.3f} to {most:+.3f})" if name != "FedAvg" else ""
        spread = f"{row['spread']:.3f}" if row["num_seeds"] > 1 else ""
        sent = f"{row['bytes']:,}" if row["bytes"] else ""
        seeds = str(row["num_seeds"]) if name != "base" else ""
        lines.append(f"| {' | '.join([name, seeds, *losses, spread, beside, sent])} |")
    scale = (
        f"{run['num_rounds']} rounds of {run['local_steps']} steps of {run['batch_size']} rows, "
        f"learning rate {run['learning_rate']}, rows cut at {run['max_length']} tokens, "
        f"{run['eval_rows']} held-out rows a site."
    )
    return "\n".join([*lines, "", scale, "", _origin("evidence")])


PAGES: dict[Path, Callable[[], str]] = {
    ROOT / "README.md": table,
    ROOT / "docs/precision.md": precisions,
    ROOT / "docs/evidence.md": evidence,
}


def written(page: str, figures: str) -> str:
    """A page's text with the figures of today's records between its two marks."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{figures}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put them into the pages")
    writing = parser.parse_args().write
    for page, figures in PAGES.items():
        if writing:
            text = page.read_text(encoding="utf-8")
            page.write_text(written(text, figures()), encoding="utf-8")
        else:
            print(f"{page.relative_to(ROOT)}\n\n{figures()}\n")


if __name__ == "__main__":
    main()
