"""The command that writes jobs. Its options are the fields of the choices: stated once, there."""

import inspect
import json
import shlex
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from nvflare_llm_components.cli.app import app, one_sentence
from nvflare_llm_components.jobs.choices import JobChoices, kind_of


def job(start: str, out: Path, **options: Any) -> None:
    """Write a job: a shipped one or choices of a TOML file, and what you choose instead."""
    from nvflare_llm_components.jobs import write
    from nvflare_llm_components.jobs.shipped import SHIPPED

    given = {name: _settings(value) if isinstance(value, list) else value for name, value in options.items()}
    given = {name: value for name, value in given.items() if value not in (None, {})}
    with one_sentence():
        if start == "shipped":
            for name, choices in SHIPPED.items():
                write.write_job(choices, out / name, replacing=True)
            typer.echo(f"{out}: {len(SHIPPED)} jobs")
            return
        chosen = write.chosen(start, given)
        if out.suffix == ".toml":
            write.write_toml(chosen, out)
        else:
            write.write_job(chosen, out)
    typer.echo(f"{out}: {write.describe(chosen)}")
    shown = shlex.quote(str(out))
    step = "job" if out.suffix == ".toml" else "check"
    typer.echo(f"Next: nvflare-llm {step} {shown}{' --out FOLDER' if step == 'job' else ''}")


def _settings(words: list[str]) -> dict[str, Any]:
    """``["r=16", "site-3.batch_size=2"]`` to ``{"r": 16, "site-3": {"batch_size": 2}}``."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"expected NAME=VALUE, found {word!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        found[key] = value
    return found


def _option(choice: "Field[Any]") -> inspect.Parameter:
    plain = getattr(JobChoices(), choice.name)
    default = "" if plain in (None, {}, "") or isinstance(plain, bool) else f" [default: {plain}]"
    kind: Any = kind_of(choice)
    kind = list[str] if kind is dict else kind
    option = typer.Option(help=f"{choice.metadata['help']}{default}", show_default=False)
    return inspect.Parameter(
        choice.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _signature() -> inspect.Signature:
    start = Annotated[str, typer.Argument(help="a shipped job, choices as .toml, or: shipped (all of them)")]
    out = Annotated[Path, typer.Option(help="folder of the job; or a .toml file, for the choices alone")]
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter("start", either, default="sft", annotation=start),
            inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=Path("job"), annotation=out),
            *(_option(choice) for choice in fields(JobChoices)),
        ]
    )


job.__signature__ = _signature()  # type: ignore[attr-defined]
job.__annotations__ = {name: each.annotation for name, each in _signature().parameters.items()}
app.command()(job)
