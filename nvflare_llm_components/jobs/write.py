"""Writes a job folder of choices, or the choices themselves as TOML with a comment on each."""

import json
import sys
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

from nvflare_llm_components.jobs.choices import JobChoices, kind_of
from nvflare_llm_components.jobs.client import client_config
from nvflare_llm_components.jobs.layout import layout
from nvflare_llm_components.jobs.parts import Json
from nvflare_llm_components.jobs.server import server_config
from nvflare_llm_components.jobs.shipped import SHIPPED
from nvflare_llm_components.jobs.validate import checked
from nvflare_llm_components.tensors.text import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_START = "start"


def chosen(start: str, given: Mapping[str, Any]) -> JobChoices:
    """The choices of a shipped job or a TOML file, with those given in place of its own.

    Args:
        start: name of a shipped job, or path of a ``.toml`` file.
        given: choices by name; settings (``sft``, ``lora``, ...) are added to those of the start.

    Raises:
        ValueError: there is no such start or choice, or a choice is out of its range.
        OSError: the file can't be read.
    """
    own = _read(Path(start)) if start.endswith(".toml") else {_START: start}
    name = own.pop(_START, "sft")
    if name not in SHIPPED:
        raise ValueError(f"start: expected one of {', '.join(SHIPPED)}. Found {printable(name, 60)!r}.")
    return checked(_with(_with(SHIPPED[name], own), given))


def write_job(choices: JobChoices, out: Path, name: str | None = None, replacing: bool = False) -> list[Path]:
    """Writes a job folder.

    Args:
        choices: what it is made of.
        out: the folder.
        name: of the job; None is the folder's.
        replacing: whether the folder may exist.

    Returns:
        The files.

    Raises:
        FileExistsError: the folder exists.
    """
    if out.exists() and not replacing:
        raise FileExistsError(f"{out}: expected no such folder yet. Choose another --out, or remove it.")
    contents: dict[str, Json] = {"meta.json": meta(choices, name or out.resolve().name)}
    for app, sites in contents["meta.json"]["deploy_map"].items():
        site = sites[0] if app != "app" else None
        if site is None:
            contents[f"{app}/config/config_fed_server.json"] = server_config(choices)
        contents[f"{app}/config/config_fed_client.json"] = client_config(choices, site)
    for path, content in contents.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(layout(content) + "\n", encoding="utf-8")
    return [out / path for path in contents]


def write_toml(choices: JobChoices, out: Path) -> None:
    """Writes the choices as :func:`to_toml` has them.

    Raises:
        FileExistsError: the file exists.
    """
    if out.exists():
        raise FileExistsError(f"{out}: expected no such file yet. Choose another --out, or remove it.")
    out.write_text(to_toml(choices), encoding="utf-8")


def describe(choices: JobChoices) -> str:
    """What was chosen, in a sentence."""
    names = choices.site_names
    adapter = choices.peft_config
    trained = f"{adapter['peft_type']} {adapter.get('r', '')}".strip() if adapter else "all weights"
    budget = f"{choices.local_epochs:g} epoch{'s' * (choices.local_epochs != 1)}"
    if choices.local_steps is not None:
        budget = f"{choices.local_steps} steps"
    parts = [
        f"{choices.workflow} of {len(names)} sites ({', '.join(names[:8])}{', ...' * (len(names) > 8)})",
        f"{choices.rounds} rounds of {budget}",
        f"{trained} at learning rate {choices.lr:g}",
        f"{choices.precision} messages",
    ]
    if choices.quorum:
        parts.append(f"goes on with {choices.quorum} results after {choices.grace_s:g} s")
    parts += [f"{site} has its own {', '.join(own)}" for site, own in choices.per_site.items()]
    parts.append("final model evaluated" if choices.evaluates_final else "final model not evaluated")
    return "; ".join(parts)


def to_toml(choices: JobChoices) -> str:
    """The choices as TOML, a comment above each; those at their default are commented out."""
    plain = JobChoices()
    lines = ["# Choices of a job: nvflare-llm job THIS.toml --out FOLDER", ""]
    tables = []
    for each in fields(choices):
        value, default = getattr(choices, each.name), getattr(plain, each.name)
        if isinstance(default, dict):
            tables += _table(each, value)
        else:
            shown = f"{each.name} = {'' if value is None else json.dumps(value, ensure_ascii=False)}"
            lines += [f"# {each.metadata['help']}", f"# {shown}" if value == default else shown]
    return "\n".join([*lines, "", *tables])


def meta(choices: JobChoices, name: str) -> Json:
    """``meta.json`` of a job: sites with settings of their own get an app of their own."""
    own = {f"app_{site}": [site] for site in choices.site_names if site in choices.per_site}
    others = [site for site in choices.site_names if site not in choices.per_site]
    return {
        "name": name,
        "min_clients": choices.quorum or len(choices.site_names),
        "deploy_map": {"app": ["server", *others] if own else ["@ALL"], **own},
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: expected TOML. Found {error}.") from error


def _with(choices: JobChoices, given: Mapping[str, Any]) -> JobChoices:
    kinds = {each.name: each for each in fields(choices)}
    given = {**given, "per_site": _by_site(given["per_site"])} if "per_site" in given else given
    changes = {}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(
                f"{printable(name, 60)}: expected one of {', '.join(kinds)}. Found no such choice."
            )
        changes[name] = _of_kind(kinds[name], value)
        if isinstance(changes[name], Mapping):
            changes[name] = _merged(getattr(choices, name), changes[name])
    return replace(choices, **changes)


def _merged(own: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in own.keys() & added.keys() if isinstance(own[key], Mapping)}
    return {**own, **added, **{key: {**own[key], **added[key]} for key in both}}


def _by_site(own: Any) -> Any:
    """``{"site-3.batch_size": 2}``, as the command line has it, to ``{"site-3": {"batch_size": 2}}``."""
    if not isinstance(own, Mapping):
        return own
    found: dict[str, Any] = {}
    for key, value in own.items():
        site, dot, name = key.rpartition(".")
        if isinstance(value, Mapping) or not dot:
            found[key] = value
        else:
            found.setdefault(site, {})[name] = value
    return found


def _of_kind(choice: "Field[Any]", value: Any) -> Any:
    """The value, if it is of the choice's type; a whole number may stand for a fraction, or for sites."""
    kind = kind_of(choice)
    if choice.name == "sites" and type(value) is int:
        return str(value)
    expected: Any = {float: (int, float), dict: Mapping}.get(kind, kind)
    if not isinstance(value, expected) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{choice.name}: expected {kind.__name__}. Found {printable(repr(value), 60)}.")
    return value


def _table(choice: "Field[Any]", value: dict[str, Any]) -> list[str]:
    lines = [f"# {choice.metadata['help']}"]
    nested = {key: own for key, own in value.items() if isinstance(own, dict)}
    flat = {key: own for key, own in value.items() if key not in nested}
    lines.append(f"[{choice.name}]" if value else f"# [{choice.name}]")
    lines += [f"{json.dumps(key)} = {json.dumps(own, ensure_ascii=False)}" for key, own in flat.items()]
    for key, own in nested.items():
        lines += [f"[{choice.name}.{json.dumps(key)}]"]
        lines += [
            f"{json.dumps(name)} = {json.dumps(each, ensure_ascii=False)}" for name, each in own.items()
        ]
    return [*lines, ""]
