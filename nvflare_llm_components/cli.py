"""The ``nvflare-llm`` command: a thin Typer shell over :mod:`nvflare_llm_components.tools`.

Commands import what they call inside their function: ``nvflare-llm --help`` then needs no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nvflare_llm_components.tools.shell import CommandError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of large language models on NVIDIA FLARE, by JSON jobs alone.",
)

Seed = Annotated[int, typer.Option(help="The same seed gives the same bytes.")]


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Shows what the user got wrong as one sentence on stderr and exits with code 2, or 1 if a job failed."""
    try:
        yield
    except (ValueError, OSError, CommandError) as error:
        typer.secho(f"Error: {error}", err=True, fg="red")
        raise typer.Exit(1 if isinstance(error, CommandError) else 2) from error


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="dolly, alpaca or oasst1")],
    raw: Annotated[list[Path], typer.Argument(help="published files: .jsonl, .json or .parquet")],
    out: Annotated[Path, typer.Option(help="folder for training, validation and testing.jsonl")],
    seed: Seed = 0,
    validation_fraction: Annotated[float, typer.Option(help="share of rows held out for validation")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="share of rows held out for testing")] = 0.1,
) -> None:
    """Turn published instruction data into training, validation and testing rows of {"input", "output"}."""
    from nvflare_llm_components.data.prepare import prepare as run

    with _one_sentence():
        prepared = run(
            name, raw, out, seed=seed, validation_fraction=validation_fraction, test_fraction=test_fraction
        )
    for file_name, num_rows in prepared.num_rows.items():
        typer.echo(f"{out / file_name}: {num_rows} rows")
    typer.echo(f"{prepared.num_skipped} raw rows gave no pair of prompt and answer")


@app.command()
def partition(
    file: Annotated[Path, typer.Argument(help="a .jsonl, .json or .parquet file")],
    sites: Annotated[int, typer.Option(help="number of sites: site-1, site-2, ...")],
    method: Annotated[str, typer.Option(help="iid or dirichlet")] = "iid",
    column: Annotated[str | None, typer.Option(help="dirichlet: the column by which sites differ")] = None,
    alpha: Annotated[float, typer.Option(help="dirichlet: small means that sites differ much")] = 0.5,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="gets one folder a site; default: beside FILE")] = None,
) -> None:
    """Split one data file over sites; every row goes to exactly one."""
    from nvflare_llm_components.data.partition import partition as run

    root = out or file.parent
    with _one_sentence():
        sizes = run(file, root, num_sites=sites, method=method, column=column, alpha=alpha, seed=seed)
    for site, num_rows in sizes.items():
        typer.echo(f"{root / site / file.stem}.jsonl: {num_rows} rows")


@app.command()
def allow(
    path: Annotated[Path, typer.Argument(help="simulator workspace, startup kit, or folder of startup kits")],
    also: Annotated[
        list[str] | None, typer.Option(help="a further class or package., such as torch.optim.SGD")
    ] = None,
) -> None:
    """Let a site's jobs load this package's classes, which FLARE refuses until the site lists them."""
    from nvflare_llm_components.tools.allow import allow as run

    with _one_sentence():
        sites = run(path, also or [])
    for site in sites:
        typer.echo(site.outcome)
    if any(site.changed for site in sites):
        typer.echo("A server or client that is running reads this when it is started again.")


@app.command()
def baseline(
    job: Annotated[Path, typer.Argument(help="folder of a job whose client trains with HFSFTExecutor")],
    sites: Annotated[str, typer.Option(help="the sites whose rows are put together, by commas")],
    out: Annotated[Path, typer.Option(help="gets metrics.jsonl and the final model")],
    mode: Annotated[str, typer.Option(help="one-call, iterative or iterative-fixed")] = "one-call",
) -> None:
    """Train in one place what a job trains at its sites, to compare with it."""
    from nvflare_llm_components.tools.baseline import baseline as run

    with _one_sentence():
        model = run(job, [site for site in sites.split(",") if site], mode, out)
    typer.echo(f"Curves: {out / 'metrics.jsonl'}")
    typer.echo(f"Final model: {model}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="simulator workspaces, run directories, baselines")],
    out: Annotated[Path, typer.Option("--out", "-o", help="image: .png, .svg or .pdf")] = Path("curves.png"),
) -> None:
    """Lay the curves of runs over each other: loss, learning rate and eval loss by global step."""
    from nvflare_llm_components.tools.plots import plot as run

    with _one_sentence():
        drawn = run(runs, out)
    typer.echo(f"{out}: {', '.join(site.label for site in drawn)}")


@app.command()
def demo(
    raw: Annotated[Path | None, typer.Option(help="folder with dolly, alpaca and oasst1 files")] = None,
    out: Annotated[Path, typer.Option(help="gets all that the demo makes")] = Path("demo"),
    jobs: Annotated[
        Path | None, typer.Option(help="default: job_configs here, or the installed ones")
    ] = None,
) -> None:
    """Fine-tune one model at three sites without sharing data, and show what came of it."""
    from nvflare_llm_components.tools.demo import demo as run
    from nvflare_llm_components.tools.demo import shipped_jobs

    with _one_sentence():
        run(out=out, jobs=jobs or shipped_jobs(), raw=raw)


@app.command()
def sizes(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub name; only its config is read")],
    precision: Annotated[list[str] | None, typer.Option(help="may be repeated; default: all")] = None,
    peft: Annotated[str | None, typer.Option(help="peft_config as JSON, or a JSON file")] = None,
    clients: Annotated[int, typer.Option(help="clients that share the server's link")] = 1,
    mbps: Annotated[float, typer.Option(help="that link, in Mbit/s")] = 1000.0,
) -> None:
    """Tell bytes of a message and seconds of a round before anything is run."""
    from nvflare_llm_components.tools.sizes import show_sizes

    with _one_sentence():
        show_sizes(model, precision or None, peft, clients, mbps)


@app.command()
def traffic(
    run: Annotated[Path, typer.Argument(help="run directory of a site, or a simulator workspace")],
    plot: Annotated[Path | None, typer.Option(help="PNG; default: traffic.png in RUN")] = None,
) -> None:
    """Show what a run's messages weighed, round by round."""
    from nvflare_llm_components.tools.traffic import show_traffic

    with _one_sentence():
        drawn = show_traffic(run, plot)
    typer.echo(f"Plot: {drawn}")


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="the server's run directory: WORKSPACE/server/simulate_job")],
    out: Annotated[Path, typer.Option(help="the job folder to write")],
    job: Annotated[Path | None, typer.Option(help="the earlier job, where sites got different apps")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds of the whole; default: as the job had")] = None,
) -> None:
    """Turn what a dead or finished run left into a job that continues it."""
    from nvflare_llm_components.tools.resume import resume_job

    with _one_sentence():
        typer.echo(resume_job(run, out, job, rounds))


if __name__ == "__main__":
    app()
