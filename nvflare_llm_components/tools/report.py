"""One page of a run that needs nothing beside it: verdict, rounds, sites, messages and curves as HTML."""

import base64
import html
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from nvflare_llm_components.tools.plots import plot
from nvflare_llm_components.tools.runs import Record, SiteRun, find_runs
from nvflare_llm_components.tools.view import View, duration

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { width: 100%; background: white; }
.verdict { font-size: 1.2rem; font-weight: 600; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } }
"""


def report(run: Path, out: Path, title: str | None = None) -> Path:
    """Writes the page.

    Args:
        run: what ``plot`` takes: a simulator workspace, or a run directory.
        out: the HTML file.
        title: of the page; None is the run's folder.

    Raises:
        ValueError: there is no run.
    """
    sites = find_runs(run)
    view = View(run, Console(quiet=True))
    name = title or run.resolve().name
    parts = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="verdict">{_text(_verdict(view, sites))}</p>',
        _picture(run),
        "<h2>Rounds</h2>",
        _table(
            ("round", "eval loss before", "train loss", "out", "in", "time", "missing"),
            (_round_cells(record) for record in view.rounds()),
        ),
        "<h2>Sites</h2>",
        _table(
            ("site", "steps", "eval loss, first", "eval loss, last", "bytes of a message"),
            (_site_cells(site) for site in sites),
        ),
    ]
    page = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_text(name)}</title>"
    page += f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style>"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page + "\n".join(parts) + "</html>\n", encoding="utf-8")
    return out


def _verdict(view: View, sites: Sequence[SiteRun]) -> str:
    losses, final = view.losses(), view.final().get("eval_loss")
    course = [*losses, *([] if final is None else [final])]
    done = f"{len(view.rounds())} rounds at {len(sites)} sites"
    return f"{done}, eval loss {course[0]:.4f} to {course[-1]:.4f}" if len(course) > 1 else done


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


def _site_cells(site: SiteRun) -> list[str]:
    losses = [record.get("eval_loss") for record in site.metrics("eval")] or [None]
    rounds = site.metrics("round")
    size = site.message_bytes()
    return [
        site.label,
        f"{rounds[-1]['end_step']:,}" if rounds else "0",
        _number(losses[0]),
        _number(losses[-1]),
        f"{size:,}" if size else "not recorded",
    ]


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
