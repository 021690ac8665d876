"""Commands that look at a job, run it, and watch it."""

from pathlib import Path
from typing import Annotated

import typer

from nvflare_llm_components.cli.app import app, one_sentence

Job = Annotated[Path, typer.Argument(help="folder of a job")]
Sites = Annotated[str | None, typer.Option(help="by commas; default: the folders below the job's data")]
Workspace = Annotated[Path | None, typer.Option("--workspace", "-w", help="of the simulator")]
Also = Annotated[list[str] | None, typer.Option(help="a further class to allow: torch.optim.SGD")]


@app.command()
def check(job: Job, sites: Sites = None, workspace: Workspace = None, also: Also = None) -> None:
    """Look at a job, its sites' data and this machine before anything runs."""
    from nvflare_llm_components.jobs.read import sites_of
    from nvflare_llm_components.tools.checks.check import check as run
    from nvflare_llm_components.tools.checks.check import show

    with one_sentence():
        findings = run(job, sites_of(job, sites), workspace, also or [])
    if not show(findings):
        raise typer.Exit(1)


@app.command()
def run(
    job: Job,
    workspace: Annotated[Path, typer.Option("--workspace", "-w", help="of the simulator")] = Path(
        "workspace"
    ),
    sites: Sites = None,
    threads: Annotated[int | None, typer.Option(help="sites that work at a time; default: all")] = None,
    also: Also = None,
) -> None:
    """Check a job, allow it, and run it in the simulator; the last line is the verdict."""
    from nvflare_llm_components.jobs.read import sites_of
    from nvflare_llm_components.tools.run import run as run_job

    with one_sentence():
        run_job(job, workspace, sites_of(job, sites), threads=threads, also=also or [])


@app.command()
def submit(
    job: Job,
    kit: Annotated[Path, typer.Option(help="an administrator's startup kit: prod_00/admin@nvidia.com")],
    out: Annotated[Path, typer.Option(help="for the chain of jobs, and the result")] = Path("submitted"),
    study: Annotated[str, typer.Option(help="that the job belongs to")] = "default",
    sites_s: Annotated[
        float, typer.Option(min=0, help="seconds that its sites have to come back, before it is continued")
    ] = 300,
) -> None:
    """Submit a job to a federation and stay with it: where the server is lost, it is continued."""
    from rich.console import Console

    from nvflare_llm_components.tools.deployment import Deployment
    from nvflare_llm_components.tools.launch import Launch

    with one_sentence():
        deployment = Deployment(kit, study)
        try:
            typer.echo(Launch(deployment, out.resolve(), Console(), sites_s=sites_s).to_the_end(job))
        finally:
            deployment.close()


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="workspace, startup kits, or a run directory of the server")],
) -> None:
    """Show a run that goes on, in the simulator, POC or production: round, loss, bytes, time left."""
    from rich.console import Console

    from nvflare_llm_components.tools.view import watch as watch_run

    with one_sentence():
        watch_run(folder, Console())


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="simulator workspace, startup kits, run directory, or downloaded job")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="default: the job's name and the run's folder")] = None,
) -> None:
    """Write one page of a run that needs nothing beside it: rounds, sites, messages and curves."""
    from nvflare_llm_components.tools.report import report as write

    with one_sentence():
        typer.echo(write(run, out, title))
