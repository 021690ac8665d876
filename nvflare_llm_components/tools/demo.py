"""The whole way once: three sites, three jobs, a centralized run beside them, curves and answers."""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import nvflare_llm_components
from nvflare_llm_components.data.demo_model import save_base_model
from nvflare_llm_components.data.demo_sets import neutral_text, write_raw_sets
from nvflare_llm_components.data.records import read_records
from nvflare_llm_components.jobs.read import training_settings
from nvflare_llm_components.tools.demo_figure import Outcome, draw
from nvflare_llm_components.tools.federation import Federation, simulate
from nvflare_llm_components.tools.generation import generate
from nvflare_llm_components.tools.quiet import silence_libraries
from nvflare_llm_components.tools.runs import SiteRun
from nvflare_llm_components.tools.shell import Shell
from nvflare_llm_components.training.evaluate import evaluate_model

SITES = ("dolly", "alpaca", "oasst1")
JOBS = ("sft", "sft_int8", "peft_lora")
_RAW_FILES = {"dolly": "*dolly*", "alpaca": "*alpaca*", "oasst1": "*oasst1*train*"}
_SUFFIXES = (".jsonl", ".json", ".parquet")


def shipped_jobs() -> Path:
    """The jobs of the folder one works in, or else the package's: of its checkout, or installed with it."""
    package = Path(nvflare_llm_components.__file__).parent
    places = [Path("job_configs"), package.parent / "job_configs"]
    return next((place for place in places if place.is_dir()), package / "job_configs")


def demo(*, out: Path, jobs: Path, raw: Path | None = None, console: Console | None = None) -> None:
    """Makes what is missing, types what a user would type, and shows what came of it.

    Args:
        out: folder for all that is made.
        jobs: folder of the shipped jobs.
        raw: folder with raw files of the three sets; generated ones are used if None.
        console: where to print.

    Raises:
        CommandError: a command failed or left an incomplete run; with the end of its log.
        ValueError: ``raw`` lacks a file, or ``jobs`` a job.
    """
    console = console or Console()
    silence_libraries()
    missing = [name for name in JOBS if not (jobs / name).is_dir()]
    if missing:
        raise ValueError(f"{jobs}: expected the jobs {', '.join(JOBS)}. Found no {', '.join(missing)}.")
    # Absolute: each process of the simulator has a working directory of its own.
    places = {
        "NVFLARE_LLM_MODEL": str(out.resolve() / "model"),
        "NVFLARE_LLM_DATA": str(out.resolve() / "data"),
    }
    # One thread a process: trainings that each take all cores would wait for each other.
    torch.set_num_threads(1)
    shell = Shell(console, places | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    os.environ.update(places)
    _prepare(shell, out, raw)
    shell.export()
    federations = [simulate(shell, jobs / name, out / name, SITES) for name in JOBS]
    outcomes = [_outcome(federation) for federation in federations]
    central = _centralized(shell, jobs / JOBS[0], out / "centralized")
    _show(console, outcomes, central, out)


def _prepare(shell: Shell, out: Path, raw: Path | None) -> None:
    files = raw_files(raw) if raw else generated_files(shell.console, out)
    for name in SITES:
        command = ["nvflare-llm", "prepare", name, *map(str, files[name]), "--out", str(out / "data" / name)]
        shell.run(command, out / "logs" / f"prepare-{name}.txt")
    if raw:
        rows = [row for name in SITES for row in read_records(out / "data" / name / "training.jsonl")]
        # Prompts only: the base model must not have read the answers that the sites teach.
        _make_model(shell.console, out, [row["input"] for row in rows], vocab_size=2048)
    else:
        _make_model(shell.console, out, neutral_text(num_lines=8000), vocab_size=512)


def raw_files(raw: Path) -> dict[str, list[Path]]:
    """The raw files of each of the three sets in a folder.

    Args:
        raw: the folder.

    Returns:
        Files by name of the set.

    Raises:
        ValueError: a set has no file.
    """
    found = {
        name: sorted(file for file in raw.glob(pattern) if file.suffix in _SUFFIXES)
        for name, pattern in _RAW_FILES.items()
    }
    for name, files in found.items():
        if not files:
            raise ValueError(
                f"{raw}: expected a file {_RAW_FILES[name]} ({', '.join(_SUFFIXES)}). Found none."
            )
    return found


def generated_files(console: Console, out: Path) -> dict[str, list[Path]]:
    """Raw files of three generated sets, by name of the set."""
    console.print("Generating three instruction sets: one to read, one to rewrite, one to know.")
    return {name: [file] for name, file in write_raw_sets(out / "raw", num_rows=400).items()}


def _make_model(console: Console, out: Path, text: Sequence[str], vocab_size: int) -> None:
    with console.status("Making a small base model ...") as status:

        def progress(step: int, loss: float) -> None:
            status.update(f"Making a small base model: step {step}, loss {loss:.2f}")
            if step % 100 == 0:
                console.print(f"  base model: step {step}, loss {loss:.2f}", highlight=False)

        num_weights = save_base_model(out / "model", text, vocab_size=vocab_size, progress=progress)
    console.print(f"Made a base model of {num_weights / 1e6:.1f} million weights: {out / 'model'}")


def _outcome(federation: Federation) -> Outcome:
    runs = federation.runs
    found = federation.view.final().get("sites", {})
    after = {site: found.get(site) or _loss(federation.job, federation.model, site) for site in SITES}
    before = {site: runs[site].metrics("eval")[0]["eval_loss"] for site in SITES}
    sizes = [run.message_bytes() for run in runs.values()]
    return Outcome(federation.name, runs, before, after, max(size or 0 for size in sizes), federation.seconds)


def _loss(job: Path, model: Path, site: str) -> float:
    settings = training_settings(job, site)
    if settings.eval_data is None:
        raise ValueError(f"{job}: expected `eval_data`. Found none, so there is nothing to compare.")
    with redirect_stdout(StringIO()):  # the trainer prints what the table will show
        return evaluate_model(
            model_folder=model,
            eval_data=settings.eval_data,
            base_model=settings.model_name_or_path if settings.peft_config else None,
            sft_config=settings.sft_config | {"disable_tqdm": True},
        )["eval_loss"]


def _centralized(shell: Shell, job: Path, folder: Path) -> Outcome:
    command = ["nvflare-llm", "baseline", str(job), "--sites", ",".join(SITES)]
    command += ["--mode", "one-call", "--out", str(folder)]
    seconds = shell.run(command, folder.parent / "logs" / "centralized.txt")
    base = Path(training_settings(job, SITES[0]).model_name_or_path)
    before = {site: _loss(job, base, site) for site in SITES}
    after = {site: _loss(job, folder / "model", site) for site in SITES}
    run = SiteRun("centralized", folder)
    return Outcome("centralized", {"centralized": run}, before, after, 0, seconds)


def _show(console: Console, federated: Sequence[Outcome], central: Outcome, out: Path) -> None:
    table = Table(title="Eval loss on each site's data, before and after")
    table.add_column("job")
    for column in (*SITES, "bytes a message", "seconds"):
        table.add_column(column, justify="right", no_wrap=column in SITES)  # 79 columns
    for outcome in (*federated, central):
        losses = [f"{outcome.before[site]:.3f}→{outcome.after[site]:.3f}" for site in SITES]
        size = f"{outcome.message_bytes:,}" if outcome.message_bytes else "none"
        table.add_row(outcome.name, *losses, size, f"{outcome.seconds:.0f}")
    console.print(table)
    draw(federated, central, out / "loss_curves.png")
    _write_summary([*federated, central], out / "summary.json")
    console.print(f"Curves: {out / 'loss_curves.png'}")
    _show_answers(console, out, out / JOBS[0] / "server/simulate_job/global_model/last")


def _show_answers(console: Console, out: Path, model: Path) -> None:
    rows = [row for site in SITES for row in read_records(out / "data" / site / "testing.jsonl")[:2]]
    prompts = [row["input"] for row in rows]
    before, after = (generate(folder, str(out / "model"), prompts) for folder in (out / "model", model))
    expected = [row["output"] for row in rows]
    show_answers(console, f"Answers of {model}", zip(prompts, before, after, expected, strict=True))


def show_answers(console: Console, title: str, rows: Iterable[Sequence[str]]) -> None:
    """Prints what was asked, what the model said before and after its training, and what was expected."""
    table = Table(title=title, show_lines=True)
    for column in ("prompt of testing.jsonl", "base model", "fine-tuned", "expected"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(escape(text[:200] + " ..." * (len(text) > 200)) for text in row))
    console.print(table)


def _write_summary(outcomes: Sequence[Outcome], file: Path) -> None:
    rows = [
        {
            "job": outcome.name,
            "eval_loss_before": outcome.before,
            "eval_loss_after": outcome.after,
            "message_bytes": outcome.message_bytes,
            "seconds": round(outcome.seconds, 1),
        }
        for outcome in outcomes
    ]
    file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
