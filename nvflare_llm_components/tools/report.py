"""One page of a run that needs nothing beside it: verdict, rounds, sites, messages and curves as HTML."""

import base64
import html
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from nvflare_llm_components.tensors.text import duration, printable
from nvflare_llm_components.tools.plots import plot
from nvflare_llm_components.tools.runs import Record, SiteRun, ToldRun, find_runs, having
from nvflare_llm_components.tools.traffic import TrafficLine, read_ledgers, summarize
from nvflare_llm_components.tools.view import View

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
img { width: 100%; background: white; }
.verdict { font-size: 1.2rem; font-weight: 600; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } }
"""


def report(run: Path, out: Path, title: str | None = None) -> Path:
    """Writes the page.

    Args:
        run: what ``plot`` takes: a simulator workspace, startup kits, a run directory, or a downloaded job.
        out: the HTML file.
        title: of the page; None is the job's name and the run's folder.

    Raises:
        ValueError: there is no run.
    """
    sites = find_runs(run)
    view = View(run, Console(quiet=True))
    name = title or _name(run, view)
    parts = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="verdict">{_text(_verdict(view, sites))}</p>',
        _picture(run),
        *_rounds(view),
        "<h2>Sites</h2>",
        _table(
            ("site", _counted(sites), "eval loss, first", "eval loss, last", "bytes of a message"),
            (_site_cells(site) for site in sites),
        ),
        *_messages(run),
        f"<p>{_text(_origin(view))}</p>",
    ]
    page = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_text(name)}</title>"
    page += f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style>"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page + "\n".join(parts) + "</html>\n", encoding="utf-8")
    return out


def _name(run: Path, view: View) -> str:
    """The job's name, where the server's folder or a download has it, or else the run's folder."""
    folder = run.resolve().name
    for file in (view.model_record().parents[2] / "meta.json", run / "meta.json"):
        try:
            name = json.loads(file.read_text(encoding="utf-8"))["name"]
        except (KeyError, OSError, TypeError, ValueError, RecursionError):
            continue
        return printable(f"{name} ({folder})" if name != folder else folder, 200)
    return printable(folder, 200)


def _verdict(view: View, sites: Sequence[SiteRun]) -> str:
    """Rounds and loss, by the server's records, or where they are gone by those of the sites."""
    course = view.course() or _mean_course(sites)
    num_rounds = len(view.rounds()) or max(len(site.metrics("round")) for site in sites)
    done = f"{num_rounds} round{'s' * (num_rounds != 1)} at {len(sites)} site{'s' * (len(sites) != 1)}"
    return f"{done}, eval loss {course[0]:.4f} to {course[-1]:.4f}" if len(course) > 1 else done


def _mean_course(sites: Sequence[SiteRun]) -> list[float]:
    found = [[each["eval_loss"] for each in having(site.metrics("eval"), "eval_loss")] for site in sites]
    shortest = min(map(len, found))
    return [sum(losses) / len(losses) for losses in zip(*(own[:shortest] for own in found), strict=True)]


def _rounds(view: View) -> list[str]:
    rounds = [*map(_round_cells, view.rounds()), *_final_cells(view)]
    head = ("round", "eval loss before", "train loss", "out", "in", "time", "missing")
    return ["<h2>Rounds</h2>", _table(head, rounds)] if rounds else []


def _picture(run: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curves.png"
        plot([run], file)
        data = base64.b64encode(file.read_bytes()).decode()
    return f"<img alt='Training loss and eval loss by optimizer step' src='data:image/png;base64,{data}'>"


def _round_cells(record: Record) -> list[str]:
    return [
        str(record["round"] + 1),
        _number(record.get("eval_loss")),
        _number(record.get("train_loss")),
        decimal(record.get("bytes_out", 0)),
        decimal(record.get("bytes_in", 0)),
        duration(record.get("seconds", 0.0)),
        ", ".join(record.get("missing", [])) or "none",
    ]


def _final_cells(view: View) -> list[list[str]]:
    """What the sites found of the last model, as the round that did not follow."""
    loss = view.final().get("eval_loss")
    return [] if loss is None else [["final model", _number(loss), *[""] * 5]]


def _site_cells(site: SiteRun) -> list[str]:
    losses = [record.get("eval_loss") for record in site.metrics("eval")] or [None]
    rounds = site.metrics("round")
    size = site.message_bytes()
    return [
        site.site,
        f"{rounds[-1]['end_step']:,}" if rounds else "0",
        _number(losses[0]),
        _number(losses[-1]),
        f"{size:,}" if size else "not recorded",
    ]


def _counted(sites: Sequence[SiteRun]) -> str:
    """What the sites' records count: their steps, or the rounds that the server knows of."""
    return "rounds" if isinstance(sites[0], ToldRun) else "steps"


def _messages(run: Path) -> list[str]:
    """What went over the wire, by direction; nothing where no filter has written it down."""
    try:
        lines = summarize(read_ledgers(run))
    except FileNotFoundError:
        return []
    ways = {"down": "to the sites", "up": "from the sites"}
    head = ("way", "messages", "on the wire", "of full precision", "largest relative error")
    groups = {way: [line for line in lines if line.direction == way] for way in ways}
    cells = (_way_cells(ways[way], group) for way, group in groups.items() if group)
    return ["<h2>Messages</h2>", _table(head, cells)]


def _way_cells(name: str, lines: Sequence[TrafficLine]) -> list[str]:
    sent, full = sum(line.wire_bytes for line in lines), sum(line.full_bytes for line in lines)
    error = max((line.relative_error for line in lines if line.relative_error is not None), default=None)
    return [
        name,
        str(sum(line.num_messages for line in lines)),
        decimal(sent),
        f"{sent / max(full, 1):.1%}",
        "not recorded" if error is None else f"{error:.1e}",
    ]


def _origin(view: View) -> str:
    """The base of the last model, and with what it was trained."""
    try:
        chain = json.loads(view.model_record().read_text(encoding="utf-8"))
        base, packages = chain["base"]["name"], chain["packages"].items()
    except (AttributeError, KeyError, OSError, TypeError, ValueError, RecursionError):
        return ""
    told = ", ".join(f"{name} {version}" for name, version in packages)
    return printable(f"Base model: {base}. Trained with {told}.", 1000)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><tr>{titles}</tr>{body}</table>"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "none"


def _text(value: str) -> str:
    """Names of sites and folders come from elsewhere: nothing of them is markup."""
    return html.escape(value)
