"""Centralized training with the settings and the data of a federated job, to compare with it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvflare_llm_components.data.records import read_records, write_jsonl
from nvflare_llm_components.jobs.read import num_rounds, training_settings
from nvflare_llm_components.training.centralized import run_baseline
from nvflare_llm_components.training.settings import TrainingSettings


def baseline(job: Path, sites: Sequence[str], mode: str, out: Path) -> Path:
    """Trains centrally what a job trains at its sites: same settings, budget and rows, in one place.

    Args:
        job: the job's folder; its variables and the environment are resolved as FLARE does.
        sites: the sites whose rows are put together.
        mode: ``one-call``, ``iterative``, or ``iterative-fixed`` (each round from the first weights).
        out: gets ``metrics.jsonl``, ``model`` and the rows that were put together.

    Returns:
        The final model's folder.

    Raises:
        FileNotFoundError: a data file is missing.
        ValueError: the job, the mode or a setting can't be used.
    """
    if not sites:
        raise ValueError("`sites` should name at least one site. Found none.")
    of_sites = [training_settings(job, site) for site in sites]
    settings = of_sites[0] if len(sites) == 1 else _put_together(of_sites, out / "data")
    _forget_curves(out)
    return run_baseline(mode=mode, folder=out, num_rounds=num_rounds(job), settings=settings)


def _put_together(settings: Sequence[TrainingSettings], folder: Path) -> TrainingSettings:
    paths: dict[str, Any] = {"train_data": folder / "training.jsonl"}
    if all(site.eval_data for site in settings):
        paths["eval_data"] = folder / "validation.jsonl"
    for name, path in paths.items():
        files = [getattr(site, name) for site in settings]
        write_jsonl(path, [row for file in files for row in read_records(file)])
    return replace(settings[0], **paths)


def _forget_curves(out: Path) -> None:
    """Removes an earlier baseline's records, which would otherwise be continued."""
    (out / "metrics.jsonl").unlink(missing_ok=True)
