"""Curves of federated runs and baselines, laid over each other by global step."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nvflare_llm_components.tools.runs import SiteRun, find_runs

_PANELS = (
    ("training loss", "train", "loss"),
    ("learning rate", "train", "learning_rate"),
    ("eval loss at the start of a round", "eval", "eval_loss"),
)


def plot(paths: Sequence[Path], out: Path) -> list[SiteRun]:
    """Draws training loss, learning rate and eval loss of all runs over the step, with the rounds marked.

    Args:
        paths: what :func:`find_runs` takes.
        out: image to write; its suffix tells the format (``.png``, ``.svg``, ``.pdf``).

    Returns:
        The runs that were drawn.

    Raises:
        ValueError: a path holds no run, or the format is not known.
    """
    runs = [run for path in paths for run in find_runs(path)]
    figure = Figure(figsize=(9, 10), layout="constrained")
    axes = figure.subplots(len(_PANELS), sharex=True)
    for axis, (title, kind, key) in zip(axes, _PANELS, strict=True):
        for run, width in zip(runs, _widths(len(runs)), strict=True):
            _draw(axis, run, kind, key, width)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    axes[-1].set_xlabel("optimizer step")
    _mark_rounds(axes, runs)
    save(figure, out)
    return runs


def save(figure: Figure, out: Path) -> None:
    """Writes a figure without any display.

    Args:
        figure: what to write.
        out: image; its suffix tells the format.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(out, dpi=120)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Running mean over the last ``window`` values (fewer at the start)."""
    starts = (max(0, end - window) for end in range(1, len(values) + 1))
    return [sum(values[start:end]) / (end - start) for end, start in enumerate(starts, 1)]


def _widths(num_runs: int) -> list[float]:
    """Points: the first run's line is the widest, so that equal curves on top of it hide none."""
    return [1.2 + 4 * place / max(num_runs - 1, 1) for place in reversed(range(num_runs))]


def _draw(axis: Axes, run: SiteRun, kind: str, key: str, width: float) -> None:
    records = [record for record in run.metrics(kind) if record.get(key) is not None]
    steps, values = [record["step"] for record in records], [record[key] for record in records]
    if key == "loss":
        (line,) = axis.plot(steps, values, alpha=0.2, linewidth=1)
        axis.plot(steps, smoothed(values, 10), color=line.get_color(), linewidth=width, label=run.label)
    else:
        marker = "o" if kind == "eval" else ""
        axis.plot(steps, values, marker=marker, markersize=4 + width, linewidth=width, label=run.label)


def _mark_rounds(axes: Sequence[Axes], runs: Sequence[SiteRun]) -> None:
    """Lines at the round boundaries of the run with most rounds; other runs may have other boundaries."""
    rounds = max((run.metrics("round") for run in runs), key=len)
    for record in rounds:
        axes[0].text(record["start_step"], 1.01, f" round {record['round']}", transform=_above(axes[0]))
        for axis in axes:
            axis.axvline(record["start_step"], color="grey", linewidth=0.8, linestyle=":")


def _above(axis: Axes) -> object:
    """Coordinates with x in steps and y in shares of the panel's height."""
    return axis.get_xaxis_transform()
