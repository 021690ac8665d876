"""Edits a job's configuration so that it goes on from an earlier run."""

import importlib
import inspect
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_llm_components.persistors import SafetensorsModelPersistor
from nvflare_llm_components.server_model import SafetensorsModule
from nvflare_llm_components.widgets import EarlierRunState

Config = dict[str, Any]
MOST_JOBS = 16
"""Of a chain of jobs, those whose state a site looks for: each restart of a server adds one."""
_MAX_HOPS = 5  # from a variable to a variable
_FIRST, _COUNT = "start_round", "num_rounds"
_OURS = ("nvflare", "nvflare_llm_components")
_INITIALIZERS = ("nvflare.app_common.workflows.initialize_global_weights.InitializeGlobalWeights",)


def _path_of(component: type) -> str:
    return f"{component.__module__}.{component.__name__}"


PERSISTOR, MODULE, STATE = map(_path_of, (SafetensorsModelPersistor, SafetensorsModule, EarlierRunState))


@dataclass(frozen=True)
class Rounds:
    """Rounds of a job: the first, and how many there are from it on."""

    first: int
    count: int


def components_of(config: Config, path: str) -> list[Config]:
    """The components of a class, by its path."""
    return [component for component in config.get("components", []) if component.get("path") == path]


def rounds_of(config: Config, recorded: int | None = None) -> Rounds:
    """The rounds that a server's configuration asks for.

    Args:
        config: the server's configuration.
        recorded: rounds of the whole, as the run itself wrote them; this machine's environment need not be
            the server's.

    Raises:
        ValueError: if it has no workflow that can begin in the middle, or they can't be told.
    """
    workflow, defaults = _workflow(config)
    args = workflow.get("args", {})
    first = _number(args.get(_FIRST, defaults.get(_FIRST, 0)), config) or 0
    count = _number(args.get(_COUNT, defaults.get(_COUNT)), config, with_environment=recorded is None)
    if count is None and recorded is not None:
        count = recorded - first
    if count is None:
        raise ValueError(
            f"num_rounds of workflow {workflow['path']}: expected a number, found {args.get(_COUNT)!r}, "
            "which this machine's environment does not resolve. Say how many rounds the whole has (--rounds)."
        )
    return Rounds(first, count)


def earlier_model_of(config: Config) -> str | None:
    """What a server's configuration goes on from itself, if it continues an earlier run."""
    found: str | None = _persistor(config).get("args", {}).get("resume_from")
    return found


def earlier_state_of(config: Config) -> Config:
    """Where a configuration takes a site's state from, if it continues an earlier run."""
    return next((dict(component.get("args", {})) for component in components_of(config, STATE)), {})


def continue_server(config: Config, rounds: Rounds, resume_from: str | None) -> None:
    """Set a server's configuration to rounds and model.

    Args:
        config: the server's configuration; changed.
        rounds: those still to do.
        resume_from: run directory of the earlier job, as the server will find it; None to leave the start.

    Raises:
        ValueError: if it has no persistor of ours, or no workflow that can begin in the middle.
    """
    workflow, _ = _workflow(config)
    persistor = _persistor(config)
    workflow["args"] = {**workflow.get("args", {}), _FIRST: rounds.first, _COUNT: rounds.count}
    if resume_from is None:
        return
    for component in [persistor, *components_of(config, MODULE)]:
        component["args"] = {**component.get("args", {}), "resume_from": resume_from}
    # A site would be asked for the weights of round 0, and all that was trained since would be lost.
    config["workflows"] = [w for w in config["workflows"] if w.get("path") not in _INITIALIZERS]
    persistor["args"].pop("initial_weights", None)


def continue_state(config: Config, args: Config) -> None:
    """Let a side's configuration, server's or client's, take up the state of an earlier run."""
    others = [c for c in config.get("components", []) if c.get("path") != STATE]
    config["components"] = [*others, {"id": "earlier_run_state", "path": STATE, "args": args}]


def continue_job_ids(config: Config, job_id: str) -> None:
    """Let a deployed job's side take up the state of a job, or of the latest before it that has left one."""
    before = earlier_state_of(config).get("job_ids", [])
    continue_state(config, {"job_ids": [job_id, *before][:MOST_JOBS]})


def _workflow(config: Config) -> tuple[Config, dict[str, Any]]:
    """The workflow that trains, and the defaults of its rounds."""
    named = {w.get("path", "?"): (w, _round_arguments(w)) for w in config.get("workflows", [])}
    for workflow, defaults in named.values():
        if defaults.keys() >= {_FIRST, _COUNT}:
            return workflow, defaults
    raise ValueError(
        f"workflows: expected one with {_COUNT} and {_FIRST}, found {list(named)}. Such a job can't begin in "
        "the middle, and can't be continued."
    )


def _round_arguments(workflow: Config) -> dict[str, Any]:
    """Arguments of a workflow that count rounds, with their defaults (None for none)."""
    module, _, name = workflow.get("path", "").rpartition(".")
    if module.partition(".")[0] not in _OURS:  # a class of the job itself: believe what the job writes
        return dict.fromkeys((_FIRST, _COUNT)) if _COUNT in workflow.get("args", {}) else {}
    found: dict[str, Any] = {}
    for base in getattr(importlib.import_module(module), name).__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters
            for key in (_FIRST, _COUNT):
                if key in parameters and key not in found:
                    default = parameters[key].default
                    found[key] = None if default is inspect.Parameter.empty else default
            if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
                break  # what it does not name does not reach its bases
    return found


def _persistor(config: Config) -> Config:
    found = components_of(config, PERSISTOR)
    if not found:
        raise ValueError(
            f"components: expected a {PERSISTOR}, found no persistor of ours. Such a job can't be continued."
        )
    return found[0]


def _number(value: Any, config: Config, with_environment: bool = True) -> int | None:
    """A number where FLARE would find one: written, at the top of the configuration, in the environment."""
    for _ in range(_MAX_HOPS):
        if not isinstance(value, str):
            break
        name = re.fullmatch(r"\{(\$?)(\w+)\}", value)
        if name is None:
            return int(value) if value.isdecimal() else None
        variables = config if not name[1] else os.environ if with_environment else {}
        value = variables.get(name[2])
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def resolved_path(path: str, run_dir: Path, site: str) -> Path:
    """A path of a configuration, with the variables that FLARE sets for a run."""
    known = {"WORKSPACE": str(run_dir.parent), "JOB_ID": run_dir.name, "SITE_NAME": site}
    return Path(re.sub(r"\{(\w+)\}", lambda found: known.get(found[1], found[0]), path))
