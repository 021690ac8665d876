"""Checks of what lies on this machine for each site: model folder, rows, template, steps of a round."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools.checks.subject import (
    Finding,
    Subject,
    by_sentence,
    error,
    note,
    warning,
)
from nvflare_llm_components.training.budget import Budget, batches_per_epoch, steps_per_epoch

LARGE_BYTES = 200_000_000
"""A larger file is looked at by its first rows alone."""


def check_models(subject: Subject) -> Iterator[Finding]:
    """The model is a folder with a configuration, safetensors and a tokenizer, the same for all."""
    for sites, sentence in by_sentence(
        (site, found) for site, name in subject.models().items() if (found := _model_fault(name))
    ):
        yield error(f"{sites}: {sentence}")
    shapes = {site: _shape(folder) for site, folder in subject.local_models().items()}
    for site, shape in shapes.items():
        if "server" in shapes and shape != shapes["server"]:
            yield error(
                f"model: the server's and that of {site} should have the same shape. Found "
                f"{shapes['server']} and {shape}. Give both the same model."
            )


def _model_fault(name: Any) -> str | None:
    if not isinstance(name, str) or "{" in name or name.startswith("None"):
        return None  # an unset variable, which another check names
    folder = Path(name)
    if not folder.is_dir():
        looks_like_a_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
        missing = f"model: expected a Hugging Face folder. Found nothing at {printable(name, 200)}."
        return missing if looks_like_a_path else None
    if not folder.is_absolute():
        return (
            f"model: expected an absolute path, since each process has its own working folder. Found "
            f"{printable(name, 200)}. Type $PWD/ before it."
        )
    for pattern, what in (
        ("config.json", "config.json"),
        ("*.safetensors", "safetensors"),
        ("tokenizer*", "a tokenizer"),
    ):
        if not any(folder.glob(pattern)) and not (folder / "adapter_config.json").is_file():
            return (
                f"model: expected {what} in {folder}. Found none. Save it with save_pretrained of "
                "transformers, model and tokenizer."
            )
    return None


def _shape(folder: Path) -> dict[str, Any]:
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return {key: config.get(key) for key in keys}


def check_rows(subject: Subject) -> Iterator[Finding]:
    """Each site's files are there, and their rows are such that one can train on them."""
    from nvflare_llm_components.training.rows import load_rows

    for site, args in subject.executors.items():
        for argument in ("train_data", "eval_data"):
            path = args.get(argument)
            if not isinstance(path, str) or "{" in path or path.startswith("None"):
                continue
            if not Path(path).is_absolute():
                yield error(
                    f"{site}: {argument}: expected an absolute path, since each process has its own working "
                    f"folder. Found {printable(path, 200)}. Type $PWD/ before it."
                )
            elif Path(path).is_file() and Path(path).stat().st_size > LARGE_BYTES:
                yield note(f"{site}: {argument}: {path} is large; its rows were not read.")
            else:
                try:
                    load_rows(Path(path), argument)
                except (ValueError, OSError) as refused:
                    yield error(f"{site}: {refused}{_columns(path, str(refused))}")


def _columns(path: str, refusal: str) -> str:
    """The columns that are there: a site's error may not name them, but here they are one's own."""
    first = first_row(path) if "expected columns" in refusal else None
    return f" Its columns: {printable(', '.join(map(str, first)), 200)}." if first else ""


def check_template(subject: Subject) -> Iterator[Finding]:
    """Rows of messages need a model with a chat template."""
    models = subject.local_models()
    for site, args in subject.executors.items():
        first = first_row(args.get("train_data"))
        if site in models and first and "messages" in first and not has_template(models[site]):
            yield error(
                f"{site}: expected a model with a chat template, for rows of messages. Found none in "
                f"{models[site]}. Use a chat model, or prepare rows of input and output."
            )


def has_template(folder: Path) -> bool:
    """Whether a model's tokenizer has a chat template."""
    file = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file() or not file.is_file():
        return (folder / "chat_template.jinja").is_file()
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))
    except json.JSONDecodeError:
        return False


def first_row(path: Any) -> dict[str, Any] | None:
    """The first row of a file as a site reads it; None where there is none."""
    return next(_rows(path), None)


def _rows(path: Any) -> Iterator[dict[str, Any]]:
    """Rows of a file as a site reads it, up to the first fault, of which another check tells."""
    from nvflare_llm_components.training.row_files import RowLimits, read_rows
    from nvflare_llm_components.training.rows import COLUMNS

    if isinstance(path, str):
        with suppress(ValueError, OSError):
            yield from (row for _, row in read_rows(Path(path), "", RowLimits(), COLUMNS))


def _num_rows(path: Any) -> int:
    """Number of rows; 0 where there is no file, or so large a one that they are not read."""
    is_large = isinstance(path, str) and Path(path).is_file() and Path(path).stat().st_size > LARGE_BYTES
    return 0 if is_large else sum(1 for _ in _rows(path))


def check_length(subject: Subject) -> Iterator[Finding]:
    """Rows are not longer than the model's positions."""
    for site, folder in subject.local_models().items():
        args = subject.executors.get(site, {})
        longest = (args.get("sft_config") or {}).get("max_length", 1024)
        try:
            positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
        except (OSError, json.JSONDecodeError):
            continue
        if args and isinstance(positions, int) and isinstance(longest, int) and longest > positions:
            yield warning(
                f"{site}: max_length is {longest}, and the model has {positions} positions. Set max_length "
                f"to {positions} at most."
            )


def check_schedule(subject: Subject) -> Iterator[Finding]:
    """How many steps a round has at each site."""
    for site, args in subject.executors.items():
        num_rows = _num_rows(args.get("train_data"))
        sft = args.get("sft_config") or {}
        size = sft.get("per_device_train_batch_size", 8)
        drops = bool(sft.get("dataloader_drop_last"))
        if not num_rows or not isinstance(size, int) or size < 1:
            continue
        num_batches = batches_per_epoch(num_rows, size, drops)
        if num_batches == 0:
            yield error(
                f"{site}: expected {size} rows, a whole batch, as dataloader_drop_last drops the rest. Found "
                f"{num_rows}. Set a smaller batch size, or dataloader_drop_last to false."
            )
            continue
        accumulation = sft.get("gradient_accumulation_steps", 1)
        steps = steps_per_epoch(num_batches, accumulation)
        budget = Budget(
            local_steps=args.get("local_steps"),
            local_epochs=args.get("local_epochs") or 1,
            steps_per_epoch=steps,
        )
        rounds = subject.workflow.get("num_rounds", 1)
        yield note(
            f"{site}: {num_rows:,} rows, {budget.boundary(1):,} steps in the first of {rounds} rounds, "
            f"{budget.boundary(rounds):,} in all"
        )


CHECKS = (check_models, check_rows, check_template, check_length, check_schedule)
