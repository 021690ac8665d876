"""The Typer application, and what its commands share."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nvflare_llm_components import __version__
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools.environment import recommend
from nvflare_llm_components.tools.shell import CommandError

PANELS = {
    "See it work": ("demo", "sizes"),
    "A job of one's own": ("prepare", "partition", "job", "check", "run", "watch"),
    "What came of it": ("plot", "report", "traffic", "generate", "evaluate", "merge", "baseline", "resume"),
    "In a federation": ("allow", "policy", "submit", "node"),
}
"""What the help shows, in the order in which one needs it."""


class _ByUse(TyperGroup):
    """Commands in the order and the panels of :data:`PANELS`; Any, since Typer has click inside or beside."""

    def list_commands(self, ctx: Any) -> list[str]:
        named = [name for names in PANELS.values() for name in names]
        return [*named, *(name for name in super().list_commands(ctx) if name not in named)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            panel = next((title for title, names in PANELS.items() if cmd_name in names), None)
            command.rich_help_panel = panel
        return command


app = typer.Typer(
    cls=_ByUse,
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
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other's developers
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
