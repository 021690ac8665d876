"""The demo with a pretrained model: three sites' rows, LoRA, int8 messages, and answers before and after."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from nvflare_llm_components.data.records import Record, read_records
from nvflare_llm_components.data.smollm2 import save_smollm2
from nvflare_llm_components.tools.checks.data import has_template
from nvflare_llm_components.tools.demo import SITES, generated_files, raw_files, show_answers
from nvflare_llm_components.tools.generation import generate
from nvflare_llm_components.tools.plots import plot
from nvflare_llm_components.tools.quiet import silence_libraries
from nvflare_llm_components.tools.run import run
from nvflare_llm_components.tools.shell import Shell

SMOLLM2 = "smollm2"
_CHOICES = ["--rounds", "3", "--local-steps", "6", "--max-length", "256"]
_NUM_ASKED = 2


def demo_pretrained(
    *, out: Path, model: str, raw: Path | None = None, console: Console | None = None
) -> None:
    """Types what a user would type with a model of their own, and shows what came of it.

    Args:
        out: folder for all that is made.
        model: ``smollm2``, or a Hugging Face folder.
        raw: folder with raw files of the three sets; generated ones are used if None.
        console: where to print.

    Raises:
        CommandError: a command failed; the last line is the cause.
        ValueError: ``raw`` lacks a file, ``model`` is no folder, or SmolLM2 can't be fetched.
    """
    console = console or Console()
    silence_libraries()
    files = raw_files(raw) if raw else generated_files(console, out)
    folder = _model(console, out, model)
    places = {"NVFLARE_LLM_MODEL": str(folder), "NVFLARE_LLM_DATA": str(out.resolve() / "data")}
    os.environ.update(places)
    shell = Shell(console, places)
    chat = ["--chat"] if has_template(folder) else []
    for name in SITES:
        command = ["nvflare-llm", "prepare", name, *map(str, files[name]), *chat]
        shell.run([*command, "--out", str(out / "data" / name)], out / "logs" / f"prepare-{name}.txt")
    job = out / "job"
    if not job.exists():
        command = ["nvflare-llm", "job", "peft_lora_int8", "--sites", ",".join(SITES), *_CHOICES]
        shell.run([*command, "--out", str(job)], out / "logs" / "job.txt")
    federation = run(job, out / "workspace", SITES, console=console)
    plot([out / "workspace"], out / "curves.png")
    _show_answers(console, out, folder, federation.model, bool(chat))
    console.print(f"Curves: {out / 'curves.png'}")


def _model(console: Console, out: Path, model: str) -> Path:
    if model != SMOLLM2:
        if not (Path(model) / "config.json").is_file():
            raise ValueError(f"--model: expected {SMOLLM2}, or a Hugging Face folder. Found {model!r}.")
        return Path(model).resolve()
    with console.status("Fetching SmolLM2-135M-Instruct (93 MB) and converting it, once ..."):
        return save_smollm2(out / "model").resolve()


def _show_answers(console: Console, out: Path, base: Path, tuned: Path, chat: bool) -> None:
    rows = [row for site in SITES for row in read_records(out / "data" / site / "testing.jsonl")[:_NUM_ASKED]]
    prompts = [row["messages"][:-1] if chat else row["input"] for row in rows]
    before = generate(base, None, prompts, 48, chat)
    after = generate(tuned, str(base), prompts, 48, chat)
    questions, expected = zip(*(_texts(row, chat) for row in rows), strict=True)
    show_answers(console, f"Answers of {tuned}", zip(questions, before, after, expected, strict=True))


def _texts(row: Record, chat: bool) -> tuple[Any, Any]:
    if chat:
        return row["messages"][-2]["content"], row["messages"][-1]["content"]
    return row["input"], row["output"]
