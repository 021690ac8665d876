"""Commands that make rows for sites."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nvflare_llm_components.cli.app import Seed, app, one_sentence


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="dolly, alpaca or oasst1; own for files of your own")],
    raw: Annotated[
        list[Path] | None, typer.Argument(help="files: .jsonl, .json, .csv or .parquet", show_default=False)
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="folder for training, validation and testing.jsonl")],
    seed: Seed = 0,
    validation_fraction: Annotated[float, typer.Option(help="share of rows held out for validation")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="share of rows held out for testing")] = 0.1,
    input_column: Annotated[str | None, typer.Option(help="own: column of the question")] = None,
    output_column: Annotated[str | None, typer.Option(help="own: column of the answer")] = None,
    context_column: Annotated[
        str | None, typer.Option(help="own: column of what follows the question")
    ] = None,
    keep_column: Annotated[
        list[str] | None, typer.Option(help="own: a further column to keep, to partition by")
    ] = None,
    chat: Annotated[bool, typer.Option(help="write messages: the model's chat template is used")] = False,
    system: Annotated[str | None, typer.Option(help="with --chat: a system message before each")] = None,
) -> None:
    """Turn published or own data into training, validation and testing rows."""
    from nvflare_llm_components.data.own_rows import Columns
    from nvflare_llm_components.data.prepare import prepare as run

    with one_sentence():
        if Path(name).is_file():
            files = shlex.join([name, *map(str, raw or [])])
            raise ValueError(
                "Data set: expected dolly, alpaca, oasst1 or own, and then files. Found a file first. Type: "
                f"nvflare-llm prepare own {files} --out {shlex.quote(str(out))}"
            )
        prepared = run(
            name,
            raw or [],
            out,
            seed=seed,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            columns=Columns(input_column, output_column, context_column, tuple(keep_column or ())),
            chat=chat,
            system=system,
        )
    for file_name, num_rows in prepared.num_rows.items():
        typer.echo(f"{out / file_name}: {num_rows} rows")
    typer.echo(f"{prepared.num_skipped} raw rows gave no pair of prompt and answer")


@app.command()
def partition(
    source: Annotated[Path, typer.Argument(help="a data file, or a folder that `prepare` wrote")],
    sites: Annotated[int, typer.Option(help="number of sites: site-1, site-2, ...")],
    method: Annotated[
        str | None, typer.Option(help="iid or dirichlet; default: dirichlet with --column, else iid")
    ] = None,
    column: Annotated[str | None, typer.Option(help="dirichlet: the column by which sites differ")] = None,
    alpha: Annotated[float, typer.Option(help="dirichlet: small means that sites differ much")] = 0.5,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="gets one folder a site; default: beside SOURCE")] = None,
) -> None:
    """Split data over sites, training, validation and testing alike; every row goes to exactly one."""
    from nvflare_llm_components.data.partition import partition as run

    root = out or (source if source.is_dir() else source.parent)
    with one_sentence():
        sizes = run(source, root, num_sites=sites, method=method, column=column, alpha=alpha, seed=seed)
    for file, by_site in sizes.items():
        for site, num_rows in by_site.items():
            typer.echo(f"{root / site / file}: {num_rows} rows")
