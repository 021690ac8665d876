"""Reads a job folder as FLARE does on one site: variables and environment resolved."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvflare.fuel.utils.json_scanner import JsonScanner
from nvflare.fuel.utils.wfconf import resolve_var_refs

from nvflare_llm_components.tensors.text import printable
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
    config = resolved(job, "client", site)
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
    config = resolved(job, "server")
    for workflow in config.get("workflows", []):
        if isinstance(workflow.get("args", {}).get("num_rounds"), int):
            return int(workflow["args"]["num_rounds"])
    raise ValueError(
        f"{job}: expected a workflow with `num_rounds` in the server's configuration. Found none."
    )


def sites_of(job: Path, named: str | None = None) -> list[str]:
    """The sites that would run a job on this machine.

    Args:
        job: the job's folder.
        named: their names by commas; None: those that the job's ``deploy_map`` names, or else the folders
            with rows below the job's data.

    Raises:
        ValueError: nobody names them.
    """
    if named is not None:
        return [site.strip() for site in named.split(",") if site.strip()]
    in_map = [site for sites in _deploy_map(job).values() for site in sites]
    if "@ALL" not in in_map and len(in_map) > 1:
        return [site for site in in_map if site != "server"]
    unset = unset_variables(config_file(job, "client", "*").read_text(encoding="utf-8"))
    if unset:
        raise ValueError(" ".join(map(unset_sentence, unset)))
    data = resolved(job, "client", "*").get("data_root")
    found = sorted(file.parent.name for file in Path(data).glob("*/training.jsonl")) if data else []
    if not found:
        missing = f"folders with training.jsonl below {data}" if data else "data_root in the job"
        raise ValueError(
            f"{job}: expected the sites' names. Found no {missing}. Give them with --sites a,b,c."
        )
    return found


def unset_variables(text: str) -> list[str]:
    """Names of environment variables that a configuration wants and that are not set."""
    wanted = dict.fromkeys(re.findall(r"\{\$(\w+)\}", text))
    return [name for name in wanted if not os.environ.get(name)]


def unset_sentence(name: str) -> str:
    """What to say of an environment variable that is not set."""
    return f"{name}: expected it in the environment. Found it unset. Type: export {name}=..."


def resolved(job: Path, side: str, site: str = "server") -> dict[str, Any]:
    """One side's configuration with variables and environment resolved; an unset variable stays or is None.

    Args:
        job: the job's folder.
        side: ``server`` or ``client``.
        site: whose app is read, where ``deploy_map`` gives sites different ones.

    Raises:
        ValueError: there is no such configuration, or it is no JSON object.
    """
    file = config_file(job, side, site)
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        resolve_var_refs(JsonScanner(config), dict(config) | {"SITE_NAME": site})
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{file}: expected a JSON object. Found {error}.") from error
    return config


def objects_in(node: object) -> Iterator[dict[str, Any]]:
    """Every JSON object in a value, itself included, in the order in which they are written."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    for value in node if isinstance(node, list) else ():
        yield from objects_in(value)


def config_file(job: Path, side: str, site: str = "server") -> Path:
    """The file of one side's configuration; see :func:`resolved`."""
    app = _app_of(job, site)
    files = sorted(job.glob(f"{app}/config/config_fed_{side}.json"))
    if len(files) != 1:
        raise ValueError(
            f"{job}: expected a job folder with one app/config/config_fed_{side}.json. Found {len(files)}."
        )
    return files[0]


def app_name(name: str) -> str:
    """A name out of a ``deploy_map``, which FLARE and our tools join to a folder.

    Raises:
        ValueError: it is a path, and so a place that the job chooses.
    """
    if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
        raise ValueError(
            f"meta.json: deploy_map: expected names of apps, folders right below the job's, found "
            f"'{printable(name, 120)}'. Mend the job, or don't use it."
        )
    return name


def _app_of(job: Path, site: str) -> str:
    apps = _deploy_map(job).items()
    return next((app_name(app) for app, sites in apps if {site, "@ALL"} & set(sites)), "*")


def _deploy_map(job: Path) -> dict[str, list[str]]:
    meta = job / "meta.json"
    try:
        apps = json.loads(meta.read_text(encoding="utf-8")).get("deploy_map", {}) if meta.is_file() else {}
        return {str(app): [str(site) for site in sites] for app, sites in apps.items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{meta}: expected a JSON object with deploy_map. Found {error}.") from error


def _settings(job: Path, args: dict[str, Any]) -> TrainingSettings:
    for name in ("model_name_or_path", "train_data"):
        if "{" in args.get(name, "{"):
            raise ValueError(
                f"{job}: expected `{name}` to be known. Found {args.get(name)!r}. "
                "Set the environment variables NVFLARE_LLM_MODEL and NVFLARE_LLM_DATA, or edit the job."
            )
    paths: dict[str, Any] = {name: Path(args[name]) for name in ("train_data", "eval_data") if name in args}
    return TrainingSettings(**(args | paths))
