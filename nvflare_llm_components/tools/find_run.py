"""Finds what an earlier run left, wherever it ran: its job, its models, its sites."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import SERVER_SITE_NAME, JobMetaKey
from nvflare.private.fed.utils.fed_utils import extract_participants

from nvflare_llm_components.checkpoint.global_models import FOLDER, earlier_model
from nvflare_llm_components.checkpoint.manifest import read_manifest
from nvflare_llm_components.jobs.read import app_name

SIMULATED = "simulate_job"
META = "meta.json"
# What FLARE writes into meta.json beside its author's settings.
_GENERATED = {key.value for key in JobMetaKey} - {
    key.value
    for key in (
        JobMetaKey.JOB_NAME,
        JobMetaKey.DEPLOY_MAP,
        JobMetaKey.RESOURCE_SPEC,
        JobMetaKey.MIN_CLIENTS,
        JobMetaKey.MANDATORY_CLIENTS,
        JobMetaKey.SCOPE,
        JobMetaKey.JOB_LAUNCHER_SPEC,
        JobMetaKey.CUSTOM_PROPS,
        JobMetaKey.STATS_POOL_CONFIG,
        JobMetaKey.EDGE_METHOD,
    )
}


@dataclass(frozen=True)
class EarlierRun:
    """What a run left.

    Attributes:
        run_dir: of the server.
        apps: folder of each app of the job, by its name.
        meta: the job's ``meta.json`` as its author wrote it.
        job_id: None in the simulator.
        study: that it was submitted to; None in the simulator.
        sites: names of its sites, as far as the run tells.
        site_dirs: run directories of the sites, by name; in the simulator, where they can be seen.
    """

    run_dir: Path
    apps: dict[str, Path]
    meta: dict[str, Any]
    job_id: str | None
    study: str | None
    sites: list[str]
    site_dirs: dict[str, Path]

    @property
    def is_simulated(self) -> bool:
        """Whether FLARE's simulator ran it."""
        return self.job_id is None

    @property
    def server_app(self) -> str:
        """Name of the app that went to the server."""
        return next(
            name
            for name, sites in deployment(self.meta).items()
            if SERVER_SITE_NAME in sites or goes_to_all(sites)
        )


def deployment(meta: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the sites that each app goes to."""
    deploy_map = meta.get("deploy_map", {})
    return {app_name(app): list(extract_participants(sites)) for app, sites in deploy_map.items()}


def goes_to_all(sites: list[str]) -> bool:
    """Whether an app goes to every site that is connected."""
    return any(site.upper() == "@ALL" for site in sites)


def find_earlier_run(path: Path, job: Path | None = None) -> EarlierRun:
    """Find the run that a path means.

    Args:
        path: a simulator's workspace, what ``nvflare job download`` wrote, or a server's run directory.
        job: the job's folder, where it can't be found there.

    Raises:
        ValueError: if there is none of them, or the job's apps are not all there.
    """
    path = path.resolve()
    for folder in (path / SERVER_SITE_NAME / SIMULATED, path / SIMULATED, path):
        if folder.name == SIMULATED and (folder / META).is_file():
            return _simulated(folder, job)
    if (path / "workspace" / META).is_file():
        jobs = [file.parent for file in path.glob(f"job/*/{META}")]
        return _deployed(path / "workspace", path / META, job or next(iter(jobs), None))
    if (path / META).is_file() and (path / f"app_{SERVER_SITE_NAME}").is_dir():
        return _deployed(path, path / META, job)
    found = "no such folder" if not path.exists() else sorted(entry.name for entry in path.iterdir())[:8]
    raise ValueError(
        f"{path}: expected a run: the workspace of `nvflare simulator`, the folder that "
        f"`nvflare job download` wrote, or the server's run directory. Found {found}. Nothing was written."
    )


def _simulated(run_dir: Path, job: Path | None) -> EarlierRun:
    workspace = run_dir.parents[1]
    site_dirs = {
        folder.parent.name: folder
        for folder in sorted(workspace.glob(f"*/{SIMULATED}"))
        if folder.parent.name != SERVER_SITE_NAME
    }
    meta, apps = _job_of(run_dir, job, {SERVER_SITE_NAME: run_dir, **site_dirs})
    return EarlierRun(run_dir, apps, meta, None, None, sorted(site_dirs), site_dirs)


def _deployed(run_dir: Path, meta_file: Path, job: Path | None) -> EarlierRun:
    meta, apps = _job_of(run_dir, job, {SERVER_SITE_NAME: run_dir})
    record = read_config(meta_file)
    told = [entry.partition(":")[0] for entry in record.get(JobMetaKey.JOB_DEPLOY_DETAIL.value) or []]
    clients = [client["name"] for client in record.get(JobMetaKey.JOB_CLIENTS.value) or []]
    model = earlier_model(run_dir / FOLDER)
    trained = (read_manifest(model).get("parents") or {}).get("sites", []) if model else []
    sites = sorted({*told, *clients, *trained} - {SERVER_SITE_NAME})
    job_id = str(record.get(JobMetaKey.JOB_ID.value, run_dir.name))
    return EarlierRun(run_dir, apps, meta, job_id, record.get(JobMetaKey.STUDY.value), sites, {})


def _job_of(run_dir: Path, job: Path | None, seen: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Path]]:
    """What the author wrote: ``meta.json``, and each app as one of its sites got it."""
    meta = read_config((job or run_dir) / META)
    meta = {key: value for key, value in meta.items() if key not in _GENERATED}
    apps = {}
    for app, sites in deployment(meta).items():
        places = [seen[site] / f"app_{site}" for site in seen if site in sites or goes_to_all(sites)]
        apps[app] = job / app if job else next(iter(places), run_dir / f"app_of_{app}")
    missing = [app for app, folder in apps.items() if not (folder / "config").is_dir()]
    if missing or not apps:
        raise ValueError(
            f"{job or run_dir}: expected the job's apps {sorted(apps)}, found no {missing or 'deploy_map'}. "
            "Give the earlier job's folder (--job)."
        )
    return meta, apps


def read_config(file: Path) -> dict[str, Any]:
    """The JSON of a job's file.

    Raises:
        ValueError: there is no such file.
    """
    if not file.is_file():
        raise ValueError(
            f"{file}: expected the job's {file.name}, found no such file. Give the job's folder (--job)."
        )
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
