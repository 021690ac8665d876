"""The ``nvflare-llm`` command: a thin Typer shell over :mod:`nvflare_llm_components.tools`."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
