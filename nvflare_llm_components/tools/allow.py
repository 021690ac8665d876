"""Adds this package to what a site lets jobs load: the ``class_allow_list`` of ``local/resources.json``."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

PREFIX = "nvflare_llm_components."
_LIST = "class_allow_list"
_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
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


def allow(path: Path, also: Sequence[str] = ()) -> list[Allowed]:
    """Lets the sites below a folder load this package's classes; what they allowed before stays allowed.

    A list in ``resources.json`` replaces FLARE's built-in one, so a site without a list gets that one, too.
    Doing it twice changes nothing.

    Args:
        path: a startup kit, a folder with several of them (a POC workspace, a provisioning result), or the
            workspace of ``nvflare simulator``, which may be made only later.
        also: further classes (``torch.optim.SGD``) or packages (``torch.optim.``, with the dot at its end).

    Returns:
        One entry a site.

    Raises:
        NotADirectoryError: ``path`` is a file.
        ValueError: a site's ``resources.json`` is not what FLARE reads, or ``also`` names no class or
            package.
    """
    for entry in also:
        if not _ENTRY.fullmatch(entry):
            raise ValueError(
                f"--also: expected a class such as torch.optim.SGD, or a package such as torch.optim. with "
                f"the dot at its end. Found {entry!r}."
            )
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a simulator workspace or a startup kit. Found a file.")
    kits = sorted({path / kit.relative_to(path).parents[1] for kit in _kit_files(path)})
    return [_allow_site(site, [PREFIX, *also]) for site in kits or [path]]


def _kit_files(path: Path) -> list[Path]:
    return [file for pattern in _KIT_FILES for file in path.rglob(pattern)]


def _allow_site(site: Path, wanted: list[str]) -> Allowed:
    target = site / "local" / "resources.json"
    resources = _read_resources(target)
    previous = resources.get(_LIST, list(DEFAULT_CLASS_ALLOW_LIST))
    if not isinstance(previous, list):
        raise ValueError(f"{target}: `{_LIST}` should be a list. Found {type(previous).__name__}.")
    added = [] if "*" in previous else [entry for entry in wanted if entry not in previous]
    if not added and target.is_file():
        names = ", ".join(f"{entry}*" if entry.endswith(".") else entry for entry in wanted)
        return Allowed(target, f"{target}: allows {names} already; nothing changed", changed=False)
    _write(target, resources | {_LIST: previous + added})
    names = ", ".join(map(repr, added))
    return Allowed(target, f"{target}: added {names} to {len(previous)} {_kept(resources)}", changed=True)


def _kept(resources: dict[str, Any]) -> str:
    return "entries of this site" if _LIST in resources else "entries of FLARE's default list"


def _read_resources(target: Path) -> dict[str, Any]:
    """Content of the file that FLARE reads now: ``resources.json``, or else ``resources.json.default``."""
    for file in (target, target.with_name("resources.json.default")):
        if file.is_file():
            return _read_object(file)
    return {}


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{file}: expected JSON. Found {e}. Nothing was changed.") from e
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: expected a JSON object. Found {type(content).__name__}. Nothing was changed."
        )
    return content


def _write(target: Path, resources: dict[str, Any]) -> None:
    """Replaces the file in one step: a site must never find half a policy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name("resources.json.partial")
    partial.write_text(json.dumps(resources, indent=2) + "\n", encoding="utf-8")
    partial.replace(target)
