"""Curves of federated runs and baselines, laid over each other by global step."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nvflare_llm_components.tools.runs import SiteRun, find_runs

_EVAL = ("eval loss of the global model", "eval", "eval_loss")
_TRAIN = ("training loss", "train", "loss")
_RATE = ("learning rate", "train", "learning_rate")
_DASH = 5.0  # points


def plot(paths: Sequence[Path], out: Path) -> list[SiteRun]:
    """Draws training loss and eval loss of all runs over the step, with the rounds marked.

    The learning rate gets a low panel of its own where it is not constant.

    Args:
        paths: what :func:`find_runs` takes.
        out: image to write; its suffix tells the format (``.png``, ``.svg``, ``.pdf``).

    Returns:
        The runs that were drawn.

    Raises:
        ValueError: a path holds no run, or the format is not known.
    """
    runs = [run for path in paths for run in find_runs(path)]
    panels = [_TRAIN, _EVAL, *([_RATE] if _varies(runs) else [])]
    heights = [1.0 if panel is _RATE else 3.0 for panel in panels]
    figure = Figure(figsize=(9, 1.2 + 1.25 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
    axes = list(grid[:, 0])
    for axis, (title, kind, key) in zip(axes, panels, strict=True):
        for place, run in enumerate(runs):
            _draw(axis, run, kind, key, place, len(runs))
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("optimizer step")
    _mark_rounds(axes, runs)
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    for label in legend.get_texts():
        label.set_parse_math(False)  # a folder's name is no formula
    save(figure, out)
    return runs


def _varies(runs: Sequence[SiteRun]) -> bool:
    rates = {record.get("learning_rate") for run in runs for record in run.metrics("train")} - {None}
    return len(rates) > 1


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


def _draw(axis: Axes, run: SiteRun, kind: str, key: str, place: int, num_runs: int) -> None:
    records = [record for record in run.metrics(kind) if record.get(key) is not None]
    steps, values = [record["step"] for record in records], [record[key] for record in records]
    colour = f"C{place % 10}"
    if key == "loss":
        axis.plot(steps, values, alpha=0.15, linewidth=1, color=colour)
        values = smoothed(values, 10)
    marker = "o" if kind == "eval" else ""
    axis.plot(steps, values, alpha=0.5, linewidth=1, color=colour, marker=marker, markersize=4)
    # Equal curves share a line: each has its turn on it.
    turn = (_DASH * place, (_DASH, _DASH * (num_runs - 1))) if num_runs > 1 else "-"
    axis.plot(steps, values, linewidth=2.5, linestyle=turn, color=colour)
    axis.plot([], [], linewidth=2.5, color=colour, label=run.label)


def _mark_rounds(axes: Sequence[Axes], runs: Sequence[SiteRun]) -> None:
    """Lines at the round boundaries of the run with most rounds; other runs may have other boundaries."""
    rounds = max((run.metrics("round") for run in runs), key=len)
    every = max(1, -(-len(rounds) // 10))
    for number, record in enumerate(rounds):
        if number % every == 0:
            label = f" round {record['round'] + 1}"
            axes[0].text(record["start_step"], 1.01, label, transform=_above(axes[0]), fontsize="small")
        for axis in axes:
            axis.axvline(record["start_step"], color="grey", linewidth=0.8, linestyle=":")


def _above(axis: Axes) -> object:
    """Coordinates with x in steps and y in shares of the panel's height."""
    return axis.get_xaxis_transform()
