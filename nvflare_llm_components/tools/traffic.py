"""What a run sent and received: a table and a plot of the ledgers that the filters keep."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from nvflare_llm_components.quantization.ledger import LEDGER_NAME, wire_bytes_of


@dataclass(frozen=True)
class TrafficLine:
    """All messages of one site in one direction of one round.

    Attributes:
        site: who kept the ledger.
        round: the round, or None for messages outside of rounds.
        direction: ``out`` or ``in``.
        num_messages: messages.
        wire_bytes: their bytes on the wire.
        full_bytes: their bytes at full precision.
        relative_error: largest relative error among those that were encoded here.
        num_saturated: weights beyond the range of their format.
        num_nonfinite: NaN and infinite weights.
        seconds: spent encoding or decoding.
    """

    site: str
    round: int | None
    direction: str
    num_messages: int
    wire_bytes: int
    full_bytes: int
    relative_error: float | None
    num_saturated: int
    num_nonfinite: int
    seconds: float


def read_ledgers(run: Path) -> list[dict[str, Any]]:
    """All ledger lines under a run directory or a workspace.

    Raises:
        FileNotFoundError: if there is no ledger.
    """
    files = sorted(run.rglob(LEDGER_NAME))
    if not files:
        raise FileNotFoundError(
            f"Expected {LEDGER_NAME} under {run}. Found none. "
            "Give a run directory or a workspace of a job with precision filters."
        )
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def summarize(records: Sequence[dict[str, Any]]) -> list[TrafficLine]:
    """One line for each site, round and direction, in that order."""
    groups: dict[tuple[str, Any, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["site"], record["round"], record["direction"]].append(record)
    in_order = sorted(groups, key=lambda key: (key[0], -1 if key[1] is None else key[1], key[2]))
    return [_line(key, groups[key]) for key in in_order]


def show_traffic(run: Path, plot: Path | None = None, console: Console | None = None) -> Path:
    """Print the table of a run and draw its plot.

    Args:
        run: a run directory, or a workspace that holds several.
        plot: PNG to write; None is ``traffic.png`` in `run`.
        console: where to print.

    Returns:
        The PNG.

    Raises:
        FileNotFoundError: if there is no ledger under `run`.
    """
    lines = summarize(read_ledgers(run))
    (console or Console()).print(_table(run, lines))
    plot = plot or run / "traffic.png"
    _draw(lines, plot)
    return plot


def _line(key: tuple[str, Any, str], records: list[dict[str, Any]]) -> TrafficLine:
    errors = [record["relative_error"] for record in records if record["relative_error"] is not None]
    return TrafficLine(
        *key,
        num_messages=len(records),
        wire_bytes=sum(wire_bytes_of(record) for record in records),
        full_bytes=sum(max(record["bytes_before"], record["bytes_after"]) for record in records),
        relative_error=max(errors, default=None),
        num_saturated=sum(record["num_saturated"] for record in records),
        num_nonfinite=sum(record["num_nonfinite"] for record in records),
        seconds=sum(record["seconds"] for record in records),
    )


def _table(run: Path, lines: list[TrafficLine]) -> Table:
    total = sum(line.wire_bytes for line in lines)
    full = sum(line.full_bytes for line in lines)
    table = Table(title=f"{run}: {total:,} bytes on the wire, {total / max(full, 1):.4f} of full precision")
    names = (
        "site",
        "round",
        "direction",
        "messages",
        "wire bytes",
        "of full",
        "error",
        "saturated",
        "not finite",
    )
    for name in (*names, "seconds"):
        table.add_column(name, justify="left" if name in ("site", "direction") else "right", overflow="fold")
    for line in lines:
        table.add_row(
            line.site,
            "-" if line.round is None else str(line.round),
            line.direction,
            str(line.num_messages),
            f"{line.wire_bytes:,}",
            f"{line.wire_bytes / max(line.full_bytes, 1):.4f}",
            "-" if line.relative_error is None else f"{line.relative_error:.2e}",
            str(line.num_saturated),
            str(line.num_nonfinite),
            f"{line.seconds:.3f}",
        )
    return table


def _draw(lines: list[TrafficLine], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    sizes, errors = figure.subplots(1, 2)
    for site, direction in sorted({(line.site, line.direction) for line in lines}):
        own = [line for line in lines if (line.site, line.direction) == (site, direction)]
        rounds = [-1 if line.round is None else line.round for line in own]
        label = f"{site} {direction}"
        sizes.plot(rounds, [line.wire_bytes / 1e6 for line in own], marker="o", label=label)
        if direction == "out":
            errors.plot(rounds, [line.relative_error or 0.0 for line in own], marker="o", label=label)
    sizes.set(title="Bytes on the wire", xlabel="round", ylabel="MB", ylim=(0, None))
    errors.set(title="Relative error of what was sent", xlabel="round", ylim=(0, None))
    sizes.legend()
    errors.legend()
    figure.savefig(path)
