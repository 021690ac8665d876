"""Adds our components to what a site lets jobs load: ``class_allow_list`` in ``local/resources.json``."""

import importlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

from nvflare_llm_components.components import COMPONENTS
from nvflare_llm_components.tensors.atomic import replace_text
from nvflare_llm_components.tools.line_settings import read_object, write_line_settings

_PACKAGE = "nvflare_llm_components"
_LIST = "class_allow_list"
_CLASS = "  "  # begins the line of a class in an outcome
_RESOURCES = Path("local", "resources.json")
_KIT_FILES = ("startup/fed_server.json", "startup/fed_client.json")


@dataclass(frozen=True)
class Allowed:
    """What was done to one site.

    Attributes:
        resources: the file that FLARE reads from now on.
        outcome: one line for people.
        changed: False if the site allowed the package before.
    """

    resources: Path
    outcome: str
    changed: bool


def allow(path: Path, also: Sequence[str] = (), new: bool = False) -> list[Allowed]:
    """Lets the sites below a folder load this package's components; what they allowed before stays allowed.

    Each component is listed by its exact class path, nothing by prefix; what an earlier release wrote as a
    prefix of this package is taken out. A list in ``resources.json`` replaces FLARE's built-in one, so a site
    without a list gets that one, too. Doing it twice changes nothing.

    Args:
        path: a startup kit, a folder with several of them (a POC workspace, a provisioning result), or the
            workspace of ``nvflare simulator``.
        also: further classes by exact path, such as ``torch.optim.SGD``.
        new: whether ``path`` may be a simulator workspace that is yet to be made.

    Returns:
        One entry a site.

    Raises:
        NotADirectoryError: ``path`` is a file.
        ValueError: there is no site below ``path``, a site's ``resources.json`` is not what FLARE reads, or
            ``also`` names no class.
    """
    for entry in also:
        _check_class(entry)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a simulator workspace or a startup kit. Found a file.")
    kits = sorted({path / kit.relative_to(path).parents[1] for kit in _kit_files(path)})
    if not (kits or new or (path / "local").is_dir()):
        raise ValueError(
            f"{path}: expected a startup kit, a folder of them, or a simulator workspace. Found "
            f"{'none of them' if path.exists() else 'no such folder'}. "
            "For a workspace that is yet to be made, add --new."
        )
    return [_allow_kit(kit, [*COMPONENTS, *also]) for kit in kits] or [
        _allow_site(path, [*COMPONENTS, *also])
    ]


def told(sites: Sequence[Allowed]) -> list[str]:
    """What was done, in lines; a class that several sites lacked is named once."""
    lines: list[str] = []
    for site in sites:
        own = site.outcome.split("\n")
        lines += [line for line in own if not line.startswith(_CLASS) or line not in lines]
    return lines


def site_allow_list(site: Path) -> list[str]:
    """What a site lets jobs load: exact class paths, and prefixes that end in a dot.

    Raises:
        ValueError: its ``resources.json`` is not what FLARE reads.
    """
    return [str(entry) for entry in _allow_list(site)[1]]


def allows(entry: str, path: str) -> bool:
    """Whether an entry of a list lets a class through, as FLARE compares."""
    return entry in ("*", path) or path.startswith(f"{entry.rstrip('.')}.")


def _check_class(path: str) -> None:
    """Refuse what FLARE would call, though it is no class: functions, and prefixes that reach them."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None) if module and name else None
    except ImportError:
        found = None
    if not (inspect.isclass(found) and f"{found.__module__}".split(".")[0] == module.split(".")[0]):
        raise ValueError(
            f"--also: expected the exact path of one class, such as torch.optim.SGD, that is installed here. "
            f"Found {path!r}."
        )


def _kit_files(path: Path) -> list[Path]:
    return [file for pattern in _KIT_FILES for file in path.rglob(pattern)]


def _allow_kit(kit: Path, wanted: list[str]) -> Allowed:
    allowed, line = _allow_site(kit, wanted), write_line_settings(kit)
    if line is None:
        return allowed
    return replace(allowed, outcome=f"{allowed.outcome}\n{line}", changed=True)


def _allow_site(site: Path, wanted: list[str]) -> Allowed:
    resources, previous = _allow_list(site)
    target = site / _RESOURCES
    kept = [entry for entry in previous if not _is_too_wide(entry)]
    removed = [entry for entry in previous if _is_too_wide(entry)]
    added = [] if "*" in kept else [entry for entry in wanted if entry not in kept]
    if not (added or removed) and target.is_file():
        what = "everything (`*`)" if "*" in kept else f"these {len(wanted)} classes"
        return Allowed(target, f"{target}: allows {what} already; nothing changed", changed=False)
    _write(target, resources | {_LIST: kept + added})
    lines = [f"{target}: added {len(added)} classes to {_kept(kept, resources)}"]
    lines += [f"removed {entry!r}, which let a job call any function of the package" for entry in removed]
    lines += [f"{_CLASS}{entry}" for entry in added]
    return Allowed(target, "\n".join(lines), changed=True)


def _allow_list(site: Path) -> tuple[dict[str, Any], list[Any]]:
    """A site's resources, and the list in them or else FLARE's own."""
    resources = _read_resources(site / _RESOURCES)
    entries = resources.get(_LIST, list(DEFAULT_CLASS_ALLOW_LIST))
    if not isinstance(entries, list):
        raise ValueError(f"{site / _RESOURCES}: `{_LIST}` should be a list. Found {type(entries).__name__}.")
    return resources, entries


def _is_too_wide(entry: object) -> bool:
    """Whether an entry reaches more of this package than one component: FLARE compares prefixes."""
    return isinstance(entry, str) and f"{entry}.".startswith(f"{_PACKAGE}.") and entry not in COMPONENTS


def _kept(kept: list[Any], resources: dict[str, Any]) -> str:
    entries = "1 entry" if len(kept) == 1 else f"{len(kept)} entries"
    return f"{entries} of this site" if _LIST in resources else f"{entries} of FLARE's default list"


def _read_resources(target: Path) -> dict[str, Any]:
    """Content of the file that FLARE reads now: ``resources.json``, or else ``resources.json.default``."""
    for file in (target, target.with_name("resources.json.default")):
        if file.is_file():
            return read_object(file)
    return {}


def _write(target: Path, resources: dict[str, Any]) -> None:
    """Replaces the file in one step: a site must never find half a policy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, json.dumps(resources, indent=2) + "\n")
