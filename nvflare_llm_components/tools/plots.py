"""Curves of federated runs and baselines, laid over each other by global step."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nvflare_llm_components.tools.runs import SiteRun, find_runs

_EVAL = ("eval loss of the global model", "eval", "eval_loss")
_TRAIN = ("training loss", "train", "loss")
_RATE = ("learning rate", "train", "learning_rate")
_DASH = 5.0  # points
_MAX_LINES = 200
_WINDOW = 10  # optimizer steps over which a training loss is smoothed; of short runs a twentieth
_SAME = 0.025  # of the panel's range: curves that are nearer all along lie on each other
_Curve = tuple[list[int], list[float]]


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
    runs = _labelled(paths)
    panels = [_TRAIN, _EVAL, *([_RATE] if _varies(runs) else [])]
    heights = [1.0 if panel is _RATE else 3.0 for panel in panels]
    figure = Figure(figsize=(9, 1.2 + 1.25 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)
    axes = list(grid[:, 0])
    for axis, (title, kind, key) in zip(axes, panels, strict=True):
        _draw(axis, runs, kind, key)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel(runs[0].unit)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_rounds(axes, runs)
    handles = [Line2D([], [], linewidth=2.5, color=_colour(place)) for place in range(len(runs))]
    names = [run.label for run in runs]
    legend = figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small")
    for label in legend.get_texts():
        label.set_parse_math(False)  # a folder's name is no formula
    save(figure, out)
    return runs


def _labelled(paths: Sequence[Path]) -> list[SiteRun]:
    """All runs; where there is one path alone, they need no more than the sites' names."""
    runs = [run for path in paths for run in find_runs(path)]
    if len({run.unit for run in runs}) > 1:
        raise ValueError(
            "Runs: expected all with their sites' records, or all as the server tells of them. Found both, "
            "whose steps are not the same: plot them apart."
        )
    return [replace(run, label=run.site) for run in runs] if len(paths) == 1 else runs


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
    """Mean over the values around each, ``window`` of them and itself; fewer at both ends."""
    half = window // 2
    around = (values[max(0, place - half) : place + half + 1] for place in range(len(values)))
    return [sum(each) / len(each) for each in around]


def _draw(axis: Axes, runs: Sequence[SiteRun], kind: str, key: str) -> None:
    curves = []
    for place, run in enumerate(runs):
        records = [record for record in run.metrics(kind) if record.get(key) is not None]
        steps, values = [record["step"] for record in records], [record[key] for record in records]
        window = min(_WINDOW, len(values) // 20)
        if key == "loss" and window > 1:
            axis.plot(steps, values, alpha=0.15, linewidth=1, color=_colour(place))
            values = smoothed(values, window)
        curves.append((steps, values))
    for place, (turn, num_turns) in enumerate(_turns(curves)):
        # Curves that lie on each other share a line: each has its turn on it.
        style = (_DASH * turn, (_DASH, _DASH * (num_turns - 1))) if num_turns > 1 else "-"
        steps, values = curves[place]
        axis.plot(steps, values, linewidth=2, linestyle=style, color=_colour(place))
        if len(values) < 2 * _WINDOW:
            axis.plot(steps, values, linestyle="", marker="o", markersize=4, color=_colour(place))


def _colour(place: int) -> str:
    return f"C{place % 10}"


def _turns(curves: Sequence[_Curve]) -> list[tuple[int, int]]:
    """For each curve its place among those that lie on each other, and how many they are."""
    values = [value for _, own in curves for value in own]
    near = _SAME * (max(values) - min(values)) if values else 0.0
    leaders: list[dict[int, float]] = []
    groups: list[int] = []
    for curve in curves:
        points = dict(zip(*curve, strict=True))
        group = next((n for n, leader in enumerate(leaders) if _lie_together(leader, points, near)), None)
        if group is None:
            group = len(leaders)
            leaders.append(points)
        groups.append(group)
    return [(groups[:place].count(group), groups.count(group)) for place, group in enumerate(groups)]


def _lie_together(one: dict[int, float], other: dict[int, float], near: float) -> bool:
    shared = one.keys() & other.keys()
    return bool(shared) and all(abs(one[step] - other[step]) <= near for step in shared)


def _mark_rounds(axes: Sequence[Axes], runs: Sequence[SiteRun]) -> None:
    """Lines at the round boundaries of the run with most rounds; other runs may have other boundaries."""
    rounds = max((run.metrics("round") for run in runs), key=len)
    every, apart = (max(1, -(-len(rounds) // most)) for most in (10, _MAX_LINES))
    for number, record in enumerate(rounds):
        if number % every == 0:
            label = f" round {record['round'] + 1}"
            axes[0].text(record["start_step"], 1.01, label, transform=_above(axes[0]), fontsize="small")
        for axis in axes if number % apart == 0 else ():
            axis.axvline(record["start_step"], color="grey", linewidth=0.8, linestyle=":")


def _above(axis: Axes) -> object:
    """Coordinates with x in steps and y in shares of the panel's height."""
    return axis.get_xaxis_transform()
