"""The commands of a site's own policy."""

from pathlib import Path
from typing import Annotated

import typer

from nvflare_llm_components.cli.app import app, one_sentence

policy = typer.Typer(no_args_is_help=True, help="What this site accepts of jobs: its own policy.")
app.add_typer(policy, name="policy")


@policy.command("init")
def policy_init(
    kit: Annotated[Path, typer.Argument(help="startup kit, or simulator workspace")],
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, the value in TOML; may be repeated")
    ] = None,
    new: Annotated[bool, typer.Option(help="KIT is a simulator workspace that is yet to be made")] = False,
) -> None:
    """Write the site's commented policy file, with the defaults that hold without it."""
    from nvflare_llm_components.tools.policy import init_policy

    with one_sentence():
        written = init_policy(kit, setting or [], new)
    typer.echo(f"{written}: edit it; each job reads it at its first task")


@policy.command("check")
def policy_check(
    job: Annotated[Path, typer.Argument(help="the job's folder")],
    site: Annotated[Path, typer.Option(help="the site's startup kit, or a simulator workspace")],
    name: Annotated[str | None, typer.Option(help="the site's name, where the kit does not tell it")] = None,
) -> None:
    """Say what a site would refuse of a job, and why; exit code 1 if anything."""
    from nvflare_llm_components.tensors.text import printable
    from nvflare_llm_components.tools.policy import check_job

    with one_sentence():
        refusals = check_job(job, site, name)
    for refusal in refusals:
        typer.echo(printable(refusal, 2000))
    typer.echo(f"{job}: {'refused' if refusals else 'accepted'} by {site}")
    if refusals:
        raise typer.Exit(1)
