"""Commands for a trained model: ask it, merge it, judge it."""

from pathlib import Path
from typing import Annotated

import typer

from nvflare_llm_components.cli.app import app, one_sentence

Saved = Annotated[Path, typer.Argument(help="folder of a model, or of an adapter")]
Base = Annotated[str | None, typer.Option(help="an adapter's base; default: the one it names")]
Tokens = Annotated[int, typer.Option(help="length of an answer at most")]


@app.command()
def generate(
    model: Saved,
    prompt: Annotated[list[str], typer.Option(help="may be repeated")],
    base: Base = None,
    max_new_tokens: Tokens = 64,
    chat: Annotated[bool, typer.Option(help="frame the prompt by the model's chat template")] = False,
) -> None:
    """Ask a trained model."""
    from nvflare_llm_components.tools.generation import generate as run
    from nvflare_llm_components.tools.quiet import silence_libraries

    silence_libraries()
    with one_sentence():
        for answer in run(model, base, prompt, max_new_tokens, chat):
            typer.echo(answer.strip())


@app.command()
def merge(
    adapter: Saved,
    out: Annotated[Path, typer.Option(help="folder for the full model")],
    base: Base = None,
) -> None:
    """Make a full model of an adapter and its base."""
    from nvflare_llm_components.tools.generation import merge as run
    from nvflare_llm_components.tools.quiet import silence_libraries

    silence_libraries()
    with one_sentence():
        typer.echo(run(adapter, out, base))


@app.command()
def evaluate(
    model: Saved,
    rows: Annotated[Path | None, typer.Argument(help="held-out rows, such as <site>/testing.jsonl")] = None,
    base: Base = None,
    max_rows: Annotated[int, typer.Option(help="rows that are asked for the exact match")] = 100,
    max_new_tokens: Tokens = 64,
    task: Annotated[
        list[Path] | None, typer.Option(help="a task of lm-evaluation-harness: a YAML file; may be repeated")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="--task: rows of a task at most")] = None,
    chat: Annotated[bool, typer.Option(help="--task: frame prompts by the model's chat template")] = False,
) -> None:
    """Tell the loss and the exact match of a trained model on held-out rows, or what a task's metrics are."""
    from nvflare_llm_components.tools.generation import judge
    from nvflare_llm_components.tools.harness import run_tasks
    from nvflare_llm_components.tools.quiet import silence_libraries

    silence_libraries()
    with one_sentence():
        if rows is None and not task:
            raise ValueError("evaluate: expected ROWS or --task. Found neither.")
        if rows is not None:
            found = judge(model, rows, base, max_rows, max_new_tokens)
            typer.echo(f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}")
            if found.num_asked:
                typer.echo(f"exact match: {found.num_exact} of {found.num_asked}")
        for name, metrics in run_tasks(model, task, base, limit=limit, chat=chat).items() if task else ():
            told = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
            typer.echo(f"{name}: {told}")
