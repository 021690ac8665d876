"""The Typer application, and what its commands share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from nvflare_llm_components import __version__
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools.environment import recommend
from nvflare_llm_components.tools.shell import CommandError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nvflare-llm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Federated fine-tuning of large language models on NVIDIA FLARE, by JSON jobs alone."""
    recommend()


Seed = Annotated[int, typer.Option(help="The same seed gives the same bytes.")]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Shows what the user got wrong as one sentence on stderr and exits with code 2, or 1 if a job failed."""
    try:
        yield
    except (ValueError, OSError, CommandError) as error:
        lines = (printable(line, 4000) for line in str(error).splitlines())  # it may quote a job or a run
        typer.secho("Error: " + "\n".join(lines), err=True, fg="red")
        raise typer.Exit(1 if isinstance(error, CommandError) else 2) from error
