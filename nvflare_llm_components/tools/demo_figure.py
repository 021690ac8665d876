"""The demo's figure: what the federated model learns about each site's data, beside the centralized one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nvflare_llm_components.tools.plots import save, smoothed
from nvflare_llm_components.tools.runs import SiteRun


@dataclass(frozen=True)
class Outcome:
    """What one job, or the centralized run, has come to.

    Attributes:
        name: of the job.
        runs: the records, by site.
        before: eval loss of the base model by site.
        after: eval loss of the final model by site.
        message_bytes: bytes of one result on the wire, 0 without messages.
        seconds: wall time.
    """

    name: str
    runs: Mapping[str, SiteRun]
    before: Mapping[str, float]
    after: Mapping[str, float]
    message_bytes: int
    seconds: float


def draw(federated: Sequence[Outcome], central: Outcome, out: Path) -> None:
    """Draws a panel for each site (eval loss of the global model by round) and one of training losses.

    Args:
        federated: the jobs.
        central: the centralized run.
        out: image to write.
    """
    sites = list(central.before)
    figure = Figure(figsize=(4 * (len(sites) + 1), 4), layout="constrained")
    axes = figure.subplots(1, len(sites) + 1)
    for axis, site in zip(axes, sites, strict=False):
        _draw_site(axis, site, federated, central)
    _draw_training(axes[-1], federated[0], central)
    save(figure, out)


def _draw_site(axis: Axes, site: str, federated: Sequence[Outcome], central: Outcome) -> None:
    for outcome in federated:
        losses = [record["eval_loss"] for record in outcome.runs[site].metrics("eval")]
        rounds = len(outcome.runs[site].metrics("round"))
        axis.plot(range(rounds + 1), [*losses[:rounds], outcome.after[site]], marker="o", label=outcome.name)
    axis.axhline(central.after[site], color="black", linestyle="--", label=f"{central.name}, final")
    axis.set_title(f"{site}: eval loss of the global model")
    axis.set_xlabel("rounds done")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)


def _draw_training(axis: Axes, federated: Outcome, central: Outcome) -> None:
    for name, run in [*federated.runs.items(), *central.runs.items()]:
        records = run.metrics("train")
        losses = smoothed([record["loss"] for record in records], 20)
        colour = "black" if name in central.runs else None
        axis.plot([record["epoch"] for record in records], losses, label=name, color=colour, linewidth=1)
    axis.set_title(f"training loss: {federated.name} at each site, centralized")
    axis.set_xlabel("epochs done")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
