"""Turns what a dead or finished run left into a job that continues it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext

from nvflare_llm_components.checkpoint.global_models import earlier_model
from nvflare_llm_components.checkpoint.record import read_record, verify_files

PERSISTOR = "nvflare_llm_components.persistors.SafetensorsModelPersistor"
STATE_FOLDERS = ("trainer_state", "filter_state")
SIMULATED = "simulate_job"
SERVER_CONFIG, CLIENT_CONFIG = "config_fed_server.json", "config_fed_client.json"


class EarlierRunState(FLComponent):
    """Brings what a site kept of an earlier run, trainer and filter state, into the run that continues it."""

    def __init__(self, *, run_dir: str):
        """Store the setting.

        Args:
            run_dir: run directory of the earlier run at this site.
        """
        super().__init__()
        self.run_dir = run_dir

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Copy when the run starts: executor and filters look into the run directory at their first task."""
        if event_type != EventType.START_RUN:
            return
        run_dir = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
        for name in STATE_FOLDERS:
            source, target = Path(self.run_dir) / name, run_dir / name
            if source.is_dir() and not target.exists():
                shutil.copytree(source, target)
                self.log_info(fl_ctx, f"{name} continues from {source}")
            elif not target.exists():
                self.log_info(
                    fl_ctx, f"{name}: the earlier run left none at {source}; this site starts afresh"
                )


def resume_job(run: Path, out: Path, job: Path | None = None, num_rounds: int | None = None) -> str:
    """Write a job folder that continues a run: its model, the rounds still to do, each site's state.

    Args:
        run: the server's run directory of the earlier job (in the simulator: WORKSPACE/server/simulate_job).
        out: the new job folder; it must not exist.
        job: the earlier job's folder; needed only where sites got different apps.
        num_rounds: rounds of the whole, those done included; None: as the earlier job had it.

    Returns:
        What the new job continues and what was lost, in a few lines.

    Raises:
        ValueError: if the run has no job of ours in it, its model is damaged, or no round is left to do.
        FileExistsError: if `out` exists.
    """
    run = run.resolve()
    model = earlier_model(run / "global_model")
    if model:
        verify_files(model)
    _copy_job(run, out, job)
    server_files = sorted(out.rglob(SERVER_CONFIG))
    if not server_files:
        raise ValueError(f"{job or run}: expected {SERVER_CONFIG} in it, found none. Give the job's folder.")
    done = read_record(model)["round"] + 1 if model else None
    for file in server_files:
        begin, left = _continue_server(file, run, model, done, num_rounds)
    for file in [*server_files, *out.rglob(CLIENT_CONFIG)]:
        site_run = str(run) if file.name == SERVER_CONFIG else _site_run_dir(run)
        _edit(file, lambda config, folder=site_run: _add_state(config, folder))
    return "\n".join([_sentence(model, begin, left), *_sites(run)])


def _copy_job(run: Path, out: Path, job: Path | None) -> None:
    if job is not None:
        shutil.copytree(job, out)
        return
    meta = json.loads((run / "meta.json").read_text()) if (run / "meta.json").is_file() else {}
    deploy_map = meta.get("deploy_map", {})
    if len(deploy_map) > 1 or not (run / "app_server").is_dir():
        raise ValueError(
            f"{run}: expected the one app of all sites in app_server, found deploy_map {deploy_map}. "
            "Give the earlier job's folder as well (--job)."
        )
    name = next(iter(deploy_map), "app")
    shutil.copytree(run / "app_server", out / name)
    kept = {key: meta[key] for key in ("min_clients", "mandatory_clients", "resource_spec") if key in meta}
    content = {"name": f"{meta.get('name', 'job')}_resumed", "deploy_map": {name: ["@ALL"]}, **kept}
    (out / "meta.json").write_text(json.dumps(content, indent=2) + "\n")


def _continue_server(
    file: Path, run: Path, model: Path | None, done: int | None, num_rounds: int | None
) -> tuple[int, int]:
    """Set rounds and model in a server's configuration; return the first round and how many there are."""
    config = json.loads(file.read_text())
    workflow = next((w for w in config.get("workflows", []) if "num_rounds" in w.get("args", {})), None)
    persistor = next((c for c in config.get("components", []) if c.get("path") == PERSISTOR), None)
    if workflow is None or persistor is None:
        raise ValueError(
            f"{file}: expected a workflow with num_rounds and a SafetensorsModelPersistor, found "
            f"{'no persistor of ours' if workflow else 'no such workflow'}. Such a job can't be continued."
        )
    if "cyclic" in workflow["path"].lower():
        raise ValueError(f"{file}: {workflow['path']} has no start_round and can't be continued.")
    args = workflow["args"]
    first = int(_resolved(args.get("start_round", 0), config))
    total = num_rounds if num_rounds is not None else first + int(_resolved(args["num_rounds"], config))
    begin = first if done is None else done
    if begin >= total:
        raise ValueError(
            f"{run}: all {total} rounds are done. To go on, say how many the whole has (--rounds)."
        )
    args.update(start_round=begin, num_rounds=total - begin)
    if model:
        persistor.setdefault("args", {})["resume_from"] = str(run)
    file.write_text(json.dumps(config, indent=2) + "\n")
    return begin, total - begin


def _resolved(value: Any, config: dict[str, Any]) -> Any:
    """Return a value with FLARE's "{variable}" looked up at the top of the configuration."""
    found = re.fullmatch(r"\{(\w+)\}", value) if isinstance(value, str) else None
    return config[found.group(1)] if found else value


def _edit(file: Path, change: Any) -> None:
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config, indent=2) + "\n")


def _add_state(config: dict[str, Any], run_dir: str) -> None:
    path = f"{EarlierRunState.__module__}.{EarlierRunState.__name__}"
    others = [c for c in config.get("components", []) if c.get("path") != path]
    config["components"] = [*others, {"id": "earlier_run_state", "path": path, "args": {"run_dir": run_dir}}]


def _site_run_dir(run: Path) -> str:
    """Return a client's run directory of the earlier job, with FLARE's variables in it."""
    return (
        f"{run.parents[1]}/{{SITE_NAME}}/{SIMULATED}"
        if run.name == SIMULATED
        else f"{{WORKSPACE}}/{run.name}"
    )


def _sentence(model: Path | None, begin: int, left: int) -> str:
    if model is None:
        return f"No round was saved: the job starts again at round {begin}, {left} rounds."
    metrics = read_record(model.parent / "best").get("metrics", {})
    best = f" Best so far: {metrics}." if metrics else ""
    return f"Continues with round {begin}, {left} to do, from {model}.{best}"


def _sites(run: Path) -> list[str]:
    """Say which sites kept their trainer's state, where that can be seen from here."""
    if run.name != SIMULATED:
        return ["A site whose run directory still holds trainer_state goes on with it; its log says so."]
    lines = []
    for site in sorted(path.parent for path in run.parents[1].glob(f"*/{SIMULATED}") if path != run):
        kept = [name for name in STATE_FOLDERS if any((site / SIMULATED / name).glob("*"))]
        lost = "optimizer, schedule and data order start afresh"
        lines.append(f"{site.name}: goes on with {', '.join(kept)}" if kept else f"{site.name}: {lost}")
    return lines
