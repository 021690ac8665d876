"""A site's own policy: writes the commented file, and says beforehand what a job would be refused for."""

import inspect
import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from nvflare.fuel.utils.json_scanner import JsonScanner
from nvflare.fuel.utils.wfconf import resolve_var_refs
from pydantic.fields import FieldInfo

from nvflare_llm_components.components import COMPONENTS
from nvflare_llm_components.executors.accepted import check_size
from nvflare_llm_components.jobs.read import app_name, objects_in
from nvflare_llm_components.policy.job import accept_model, accept_training, check_adapter
from nvflare_llm_components.policy.json_file import check_json_alone
from nvflare_llm_components.policy.limits import check_free_disk
from nvflare_llm_components.policy.places import JobPlaces, earlier_run
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import POLICY_FILE, SitePolicy, parsed, read_policy, sections
from nvflare_llm_components.tensors.atomic import replace_text
from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tools.allow import allows, site_allow_list

_HEAD = """\
# What this site accepts of jobs for large language models. No job can override it: the stricter of both
# holds. Read by each job at its first task. An unknown key stops every job, and `nvflare-llm policy check`
# names it. A key in a comment has no ceiling.
"""
_SERVER = "server"


@dataclass(frozen=True)
class Kit:
    """A site that jobs run at.

    Attributes:
        folder: its startup kit, or a simulator workspace.
        name: of the site.
        is_server: whether it is the server.
    """

    folder: Path
    name: str
    is_server: bool


def init_policy(kit: Path, settings: Sequence[str] = (), new: bool = False) -> Path:
    """Write the commented policy with the package's defaults into a kit.

    Args:
        kit: a startup kit, or a simulator workspace.
        settings: what is to differ, each as ``section.key=value`` with the value in TOML.
        new: whether ``kit`` may be a simulator workspace that is yet to be made.

    Returns:
        The file.

    Raises:
        FileExistsError: there is one already.
        ValueError: ``kit`` is none, or a setting is unknown.
    """
    if not (new or (kit / "local").is_dir()):
        raise ValueError(f"{kit}: expected a startup kit or a simulator workspace, found no `local` in it.")
    path = kit / "local" / POLICY_FILE
    if path.exists():
        raise FileExistsError(f"{path}: there is a policy already. Edit it, or remove it first.")
    chosen = dict(_split(setting) for setting in settings)
    unknown = chosen.keys() - {f"{name}.{key}" for name, part in sections() for key in part.model_fields}
    if unknown:
        raise ValueError(f"--set: expected section.key of the policy, found {sorted(unknown)}.")
    text = policy_text(chosen)
    parsed(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)
    return path


def policy_text(chosen: dict[str, str] | None = None) -> str:
    """The commented file: every key with what it means and its default, or what was chosen instead."""
    parts = [_HEAD]
    for name, part in sections():
        parts.append(f"\n[{name}]  # {inspect.getdoc(part)}\n")
        for key, field in part.model_fields.items():
            parts += [f"# {line}\n" for line in textwrap.wrap(str(field.description), 108)]
            parts.append(f"{_line(key, field, (chosen or {}).get(f'{name}.{key}'))}\n")
    return "".join(parts)


def _line(key: str, field: FieldInfo, chosen: str | None) -> str:
    if chosen is not None:
        return f"{key} = {chosen}"
    # Strings, numbers, lists and booleans are written alike in JSON and TOML.
    return f"# {key} =" if field.default is None else f"{key} = {json.dumps(field.default)}"


def _split(setting: str) -> tuple[str, str]:
    key, sign, value = setting.partition("=")
    if not sign:
        raise ValueError(f"--set: expected section.key=value, found {setting!r}.")
    return key.strip(), value.strip()


def check_job(job: Path, kit: Path, name: str | None = None) -> list[str]:
    """What a site would refuse a job for, in one sentence each; none where it would run.

    Args:
        job: the job's folder.
        kit: the site's startup kit, or a simulator workspace.
        name: the site's, where the kit does not tell it.

    Raises:
        ValueError: ``job`` is no job for this site, ``kit`` no kit, or the site's policy can't be used.
    """
    site = _site(kit, name)
    policy = read_policy(kit / "local")
    allowed = site_allow_list(kit)
    found: list[str] = []
    for app in _apps(job, site):
        if (app / "custom").exists():
            found.append(f"{app.name}/custom: expected JSON alone, found code: it needs the right byoc.")
        try:
            check_json_alone(app)
        except PolicyError as error:
            found.append(str(error))
        side = "server" if site.is_server else "client"
        config = _resolved(app / "config" / f"config_fed_{side}.json", site)
        for path, arguments in _components(config):
            if not any(allows(entry, path) for entry in allowed):
                found.append(f"{path}: expected a class of class_allow_list. Run `nvflare-llm allow`.")
            if path in COMPONENTS:
                found += _refusals(path, arguments, policy, app, site)
    return found


def _site(kit: Path, name: str | None) -> Kit:
    startup = kit / "startup"
    is_server = (startup / "fed_server.json").is_file()
    if is_server or name == _SERVER:
        return Kit(kit, _SERVER, is_server=True)
    if name is None and (startup / "fed_client.json").is_file():
        client = json.loads((startup / "fed_client.json").read_text(encoding="utf-8")).get("client", {})
        name = str(client.get("fqsn", "")).rpartition(".")[2] or None
    if name is None or not kit.is_dir():
        raise ValueError(f"{kit}: expected a startup kit, or --name of a site of a simulator workspace.")
    return Kit(kit, name, is_server=False)


def _apps(job: Path, site: Kit) -> list[Path]:
    meta = job / "meta.json"
    if not meta.is_file():
        raise ValueError(f"{job}: expected a job's folder, found no meta.json in it.")
    deploy_map = json.loads(meta.read_text(encoding="utf-8")).get("deploy_map", {})
    apps = [
        job / app_name(app)
        for app, sites in deploy_map.items()
        if not {"@ALL", site.name}.isdisjoint(map(str, sites))
    ]
    if not apps:
        raise ValueError(f"{job}: expected an app for site '{site.name}', found none in its deploy_map.")
    return apps


def _resolved(file: Path, site: Kit) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: expected the configuration of this side of the job, found none.")
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    known = {"SITE_NAME": site.name, "WORKSPACE": str(site.folder.resolve()), "JOB_ID": "job"}
    resolve_var_refs(JsonScanner(config), dict(config) | known)
    return config


def _components(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Class path and arguments of whatever FLARE would build."""
    for found in objects_in(node):
        path = found.get("path") or found.get("class_path")
        if isinstance(path, str) and "." in path and found.get("config_type") != "dict":
            yield path, found.get("args") or {}


def _refusals(path: str, given: dict[str, Any], policy: SitePolicy, app: Path, site: Kit) -> list[str]:
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name).__init__).parameters
    unknown = sorted(given.keys() - parameters.keys())
    if unknown:
        return [f"{name}: expected its own arguments, found {unknown}."]
    known = {key: field.default for key, field in parameters.items() if field.default is not field.empty}
    arguments, places = known | given, JobPlaces(policy.places, app, os.environ)
    try:
        if name == "HFSFTExecutor":
            _require(arguments, "model_name_or_path", "train_data")
            check_free_disk(site.folder, policy.limits)
            accepted = accept_training(arguments, policy, places)
            folder = accepted.model.folder
            if folder is not None and (folder / "config.json").is_file():
                check_size(accepted)
        elif "model_name_or_path" in parameters:
            _require(arguments, "model_name_or_path")
            check_adapter(arguments.get("peft_config"), policy)
            accept_model("model_name_or_path", arguments["model_name_or_path"], places)
        elif name == "EarlierRunState":
            further = [Path(entry) for entry in policy.places.runs]
            if arguments["run_dir"]:
                present = site.folder / "job"  # whose submitter is not known yet
                earlier_run("run_dir", str(arguments["run_dir"]), further=[present.parent, *further])
    except ReportableError as error:
        return [f"{name}: {error}"]
    return []


def _require(arguments: dict[str, Any], *names: str) -> None:
    for name in names:
        value = arguments.get(name)
        if not isinstance(value, str) or "{" in value:
            raise PolicyError(
                f"{name}: expected a path or name, found {value!r}. Set NVFLARE_LLM_MODEL and "
                "NVFLARE_LLM_DATA as FLARE's process has them."
            )
