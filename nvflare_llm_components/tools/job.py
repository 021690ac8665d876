"""Reads a job folder as FLARE does on one site: variables and environment resolved."""

import json
from pathlib import Path
from typing import Any

from nvflare.fuel.utils.json_scanner import JsonScanner
from nvflare.fuel.utils.wfconf import resolve_var_refs

from nvflare_llm_components.training.settings import TrainingSettings

_EXECUTOR = "nvflare_llm_components.executors.HFSFTExecutor"


def training_settings(job: Path, site: str) -> TrainingSettings:
    """What the job's executor would train with on a site.

    Args:
        job: the job's folder.
        site: replaces ``{SITE_NAME}``.

    Returns:
        The executor's arguments.

    Raises:
        ValueError: the folder is no job, it does not use this package's executor, or a setting is missing.
    """
    config = _resolved(job, "client", SITE_NAME=site)
    for entry in config.get("executors", []):
        if entry["executor"].get("path") == _EXECUTOR:
            args = entry["executor"].get("args", {})
            return _settings(job, {name: value for name, value in args.items() if value is not None})
    raise ValueError(f"{job}: expected an executor {_EXECUTOR} in the client's configuration. Found none.")


def num_rounds(job: Path) -> int:
    """Number of rounds that the job's workflow runs.

    Args:
        job: the job's folder.

    Returns:
        Rounds.

    Raises:
        ValueError: the folder is no job, or its workflow has no number of rounds.
    """
    config = _resolved(job, "server")
    for workflow in config.get("workflows", []):
        if isinstance(workflow.get("args", {}).get("num_rounds"), int):
            return int(workflow["args"]["num_rounds"])
    raise ValueError(
        f"{job}: expected a workflow with `num_rounds` in the server's configuration. Found none."
    )


def _resolved(job: Path, side: str, **variables: str) -> dict[str, Any]:
    files = sorted(job.glob(f"*/config/config_fed_{side}.json"))
    if len(files) != 1:
        raise ValueError(
            f"{job}: expected a job folder with one app/config/config_fed_{side}.json. Found {len(files)}."
        )
    config: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
    resolve_var_refs(JsonScanner(config), dict(config) | variables)
    return config


def _settings(job: Path, args: dict[str, Any]) -> TrainingSettings:
    for name in ("model_name_or_path", "train_data"):
        if "{" in args.get(name, "{"):
            raise ValueError(
                f"{job}: expected `{name}` to be known. Found {args.get(name)!r}. "
                "Set the environment variables NVFLARE_LLM_MODEL and NVFLARE_LLM_DATA, or edit the job."
            )
    paths: dict[str, Any] = {name: Path(args[name]) for name in ("train_data", "eval_data") if name in args}
    return TrainingSettings(**(args | paths))
