"""What a run sent and received: a table, a plot or JSON of the ledgers that the filters keep.

Both ends of a message write a line: the server's and the site's. Here it is one message.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from nvflare_llm_components.quantization.ledger import LEDGER_NAME, wire_bytes_of
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools.runs import having, read_lines

_NEEDED = [
    "site",
    "direction",
    "operation",
    "bytes_before",
    "bytes_after",
    "num_saturated",
    "num_nonfinite",
    "seconds",
]

_WIDTH = 0.4  # of a bar
_HATCH = {"down": "", "up": "///"}


@dataclass(frozen=True)
class TrafficLine:
    """All messages between the server and one site in one direction of one round.

    Attributes:
        site: the site; "?" where the server did not know it.
        round: the round, from 0, or None for messages outside of rounds.
        is_final: whether they are of the evaluation of the last model, after the rounds.
        direction: ``down`` to the site, ``up`` from it.
        num_messages: messages.
        wire_bytes: their bytes on the wire.
        full_bytes: their bytes at full precision.
        relative_error: largest relative error among those that were encoded; None where it is not known.
        num_saturated: weights beyond the range of their format.
        num_nonfinite: NaN and infinite weights.
        seconds: spent encoding and decoding, at both ends as far as their ledgers are here.
    """

    site: str
    round: int | None
    direction: str
    is_final: bool
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
    return [record for file in files for record in having(read_lines(file), *_NEEDED)]


def summarize(records: Sequence[dict[str, Any]]) -> list[TrafficLine]:
    """One line for each site, round and direction, in that order."""
    groups: dict[tuple[str, Any, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        is_server = record["site"] == "server"
        site = (record.get("peer") or "?") if is_server else record["site"]
        is_down = is_server == (record["direction"] == "out")
        groups[site, record.get("round"), "down" if is_down else "up"].append(record)
    in_order = sorted(groups, key=lambda key: (key[0], -1 if key[1] is None else key[1], key[2]))
    return [_line(key, groups[key]) for key in in_order]


def traffic_json(run: Path) -> str:
    """The lines of a run as a JSON list, numbers exact.

    Raises:
        FileNotFoundError: if there is no ledger under `run`.
    """
    return json.dumps([asdict(line) for line in summarize(read_ledgers(run))], indent=2)


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
    sent = [record for record in records if record["operation"] == "quantize"]
    received = [record for record in records if record["operation"] != "quantize"]
    messages = received if len(received) > len(sent) else sent  # one end's ledger may not be here
    errors = [record["relative_error"] for record in having(sent, "relative_error")]
    return TrafficLine(
        *key,
        is_final=all(record.get("task") == "validate" for record in records),
        num_messages=len(messages),
        wire_bytes=sum(wire_bytes_of(record) for record in messages),
        full_bytes=sum(max(record["bytes_before"], record["bytes_after"]) for record in messages),
        relative_error=max(errors, default=None),
        num_saturated=sum(record["num_saturated"] for record in sent),
        num_nonfinite=sum(record["num_nonfinite"] for record in messages),
        seconds=sum(record["seconds"] for record in records),
    )


def _table(run: Path, lines: list[TrafficLine]) -> Table:
    """Columns of numbers never wrap; what is zero everywhere has none, so that it fits into 80 columns."""
    total = sum(line.wire_bytes for line in lines)
    full = sum(line.full_bytes for line in lines)
    told = f"{total:,} bytes on the wire, {total / max(full, 1):.4f} of full precision"
    table = Table(title=f"{escape(printable(run))}: {told}")
    columns = {
        "round": lambda line: "final" if line.is_final else _ordinal(line.round),
        "messages": lambda line: str(line.num_messages),
        "on the wire": lambda line: decimal(line.wire_bytes),
        "of full": lambda line: f"{line.wire_bytes / max(line.full_bytes, 1):.4f}",
        "error": lambda line: "-" if line.relative_error is None else f"{line.relative_error:.1e}",
        "seconds": lambda line: f"{line.seconds:.2f}",
    }
    if any(line.num_saturated for line in lines):
        columns["saturated"] = lambda line: str(line.num_saturated)
    if any(line.num_nonfinite for line in lines):
        columns["not finite"] = lambda line: str(line.num_nonfinite)
    table.add_column("site", overflow="fold")
    table.add_column("way", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name != "messages")
    for line in lines:
        table.add_row(escape(line.site), line.direction, *(cell(line) for cell in columns.values()))
    return table


def _ordinal(number: int | None) -> str:
    """A round as people count; the records count from 0."""
    return "-" if number is None else str(number + 1)


def _draw(lines: list[TrafficLine], path: Path) -> None:
    """Stacked bars of bytes, a pair a round: down and up; beside them the error of each message."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    sizes, errors = figure.subplots(1, 2)
    rounds = sorted({_place(line) for line in lines})
    colours = {site: f"C{number % 10}" for number, site in enumerate(sorted({line.site for line in lines}))}
    heights: dict[tuple[int, str], float] = defaultdict(float)
    for line in lines:
        shift = _WIDTH * (0.5 if line.direction == "up" else -0.5)
        place = _place(line) + shift
        size = line.wire_bytes / 1e6
        bottom = heights[_place(line), line.direction]
        look = {"color": colours[line.site], "edgecolor": "white", "hatch": _HATCH[line.direction]}
        sizes.bar(place, size, 0.9 * _WIDTH, bottom=bottom, **look)
        heights[_place(line), line.direction] += size
        if line.relative_error is not None:
            spread = _WIDTH * 0.8 * (list(colours).index(line.site) + 0.5) / len(colours) - _WIDTH * 0.4
            marker = "^" if line.direction == "up" else "v"
            errors.plot(place + spread, line.relative_error, marker, color=colours[line.site])
    names = {_place(line): "final" if line.is_final else _ordinal(line.round) for line in lines}
    for axis in (sizes, errors):
        axis.set_xticks(rounds, [names[each] for each in rounds])
        axis.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
        axis.set_xlabel("round")
        axis.grid(axis="y", alpha=0.3)
    sizes.set(title="MB on the wire: plain to the sites, hatched from them")
    errors.set(title="Relative error: ▼ to the sites, ▲ from them")
    errors.set_ylim(0, 1.15 * max((line.relative_error or 0.0 for line in lines), default=0.0) or 1.0)
    patches = [Patch(color=colour) for colour in colours.values()]
    legend = figure.legend(patches, list(colours), loc="outside lower center", ncols=6, fontsize="small")
    for label in legend.get_texts():
        label.set_parse_math(False)  # a site's name is no formula
    figure.savefig(path)


def _place(line: TrafficLine) -> int:
    return -1 if line.round is None else line.round
