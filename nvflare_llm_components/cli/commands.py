"""Commands for sites, and for what came of a run."""

from pathlib import Path
from typing import Annotated

import typer

from nvflare_llm_components.cli.app import app, one_sentence


@app.command()
def allow(
    path: Annotated[Path, typer.Argument(help="simulator workspace, startup kit, or folder of startup kits")],
    also: Annotated[
        list[str] | None, typer.Option(help="a further class by exact path, such as torch.optim.SGD")
    ] = None,
    new: Annotated[bool, typer.Option(help="PATH is a simulator workspace that is yet to be made")] = False,
) -> None:
    """Let a site's jobs load this package's components, which FLARE refuses until the site lists them."""
    from nvflare_llm_components.tools.allow import allow as run
    from nvflare_llm_components.tools.allow import told

    with one_sentence():
        sites = run(path, also or [], new)
    for line in told(sites):
        typer.echo(line)
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

    with one_sentence():
        model = run(job, [site for site in sites.split(",") if site], mode, out)
    typer.echo(f"Curves: {out / 'metrics.jsonl'}")
    typer.echo(f"Final model: {model}")


@app.command()
def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="workspaces, startup kits, run directories, downloaded jobs, baselines"),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="image: .png, .svg or .pdf")] = Path("curves.png"),
) -> None:
    """Lay the curves of runs over each other: loss, learning rate and eval loss by global step."""
    from nvflare_llm_components.tools.plots import plot as run

    with one_sentence():
        drawn = run(runs, out)
    typer.echo(f"{out}: {', '.join(site.label for site in drawn)}")


@app.command()
def demo(
    raw: Annotated[Path | None, typer.Option(help="folder with dolly, alpaca and oasst1 files")] = None,
    out: Annotated[Path, typer.Option(help="gets all that the demo makes")] = Path("demo"),
    jobs: Annotated[
        Path | None, typer.Option(help="default: job_configs here, or the installed ones")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="smollm2, or a Hugging Face folder; default: a small one, made here")
    ] = None,
) -> None:
    """Fine-tune one model at three sites without sharing data, and show what came of it."""
    from nvflare_llm_components.tools.demo import demo as run
    from nvflare_llm_components.tools.demo import shipped_jobs
    from nvflare_llm_components.tools.demo_pretrained import demo_pretrained

    with one_sentence():
        if model:
            demo_pretrained(out=out, model=model, raw=raw)
        else:
            run(out=out, jobs=jobs or shipped_jobs(), raw=raw)


@app.command()
def sizes(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub name; only its config is read")],
    precision: Annotated[list[str] | None, typer.Option(help="may be repeated; default: all")] = None,
    peft: Annotated[str | None, typer.Option(help="peft_config as JSON, or a JSON file")] = None,
    clients: Annotated[int, typer.Option(help="clients that share the server's link")] = 1,
    mbps: Annotated[float, typer.Option(help="that link, in Mbit/s")] = 1000.0,
    rate: Annotated[
        float | None, typer.Option(help="a site's own line, in Mbit/s: do the messages fit the timeouts?")
    ] = None,
    job: Annotated[Path | None, typer.Option(help="whose timeouts; default: the shipped jobs'")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="what training takes at a site instead")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="--memory: rows of a step")] = 8,
    length: Annotated[int, typer.Option(min=1, help="--memory: tokens of a row")] = 1024,
    processes: Annotated[int, typer.Option(min=1, help="--memory: processes of the site")] = 1,
    dtype: Annotated[str, typer.Option(help="--memory: of the weights")] = "float32",
    optim: Annotated[str, typer.Option(help="--memory: the optimizer")] = "adamw_torch",
) -> None:
    """Tell bytes of a message and seconds of a round, or memory of a step, before anything is run."""
    from nvflare_llm_components.tools.memory import show_memory
    from nvflare_llm_components.tools.sizes import show_sizes

    with one_sentence():
        if memory:
            show_memory(model, peft, batch_size, length, processes, dtype=dtype, optim=optim)
        else:
            show_sizes(model, precision or None, peft, clients, mbps, rate=rate, job=job)


@app.command()
def traffic(
    run: Annotated[Path, typer.Argument(help="workspace, startup kits, run directory, or downloaded job")],
    plot: Annotated[Path | None, typer.Option(help="PNG; default: traffic.png in RUN")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead; no plot")] = False,
) -> None:
    """Show what a run's messages weighed, round by round."""
    from nvflare_llm_components.tools.traffic import show_traffic, traffic_json

    with one_sentence():
        if as_json:
            typer.echo(traffic_json(run))
            return
        drawn = show_traffic(run, plot)
    typer.echo(f"Plot: {drawn}")


@app.command()
def resume(
    run: Annotated[
        Path, typer.Argument(help="simulator workspace, downloaded job, or server's run directory")
    ],
    out: Annotated[Path, typer.Option(help="the job folder to write")],
    job: Annotated[Path | None, typer.Option(help="the earlier job, where RUN does not hold it")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds of the whole; default: as the job had")] = None,
) -> None:
    """Turn what a dead or finished run left into a job that continues it."""
    from nvflare_llm_components.tools.resume import resume_job

    with one_sentence():
        typer.echo(resume_job(run, out, job, rounds))
