"""Tasks of EleutherAI's lm-evaluation-harness for a saved model, from files alone.

A task is one YAML file, with its rows in files beside it. The harness itself would also load data sets and
metrics from a hub, and run Python that a task names: both are refused here, before it sees the task.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare_llm_components.tools.generation import opened

Task = dict[str, Any]
_READERS = ("json", "csv", "parquet", "text")
_KEYS = frozenset(
    (
        "task", "task_alias", "tag", "description", "metadata", "output_type",
        "dataset_path", "dataset_name", "dataset_kwargs",
        "training_split", "validation_split", "test_split",
        "fewshot_split", "fewshot_config", "num_fewshot", "fewshot_delimiter",
        "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "gen_prefix",
        "generation_kwargs", "repeats",
        "filter_list", "metric_list",
        "should_decontaminate", "doc_to_decontamination_query",
    )
)  # fmt: skip


def run_tasks(
    saved: Path,
    tasks: Sequence[Path],
    base: str | None = None,
    *,
    limit: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """What the harness measures, by task and metric.

    Args:
        saved: a Hugging Face folder, or a PEFT folder.
        tasks: YAML files.
        base: the base model of a PEFT folder; None is the one that the folder names.
        limit: rows of a task at most.
        chat: frame the prompts by the model's chat template.
        batch_size: rows at a time.

    Raises:
        ValueError: the harness is not installed, a task is not one of files alone, or there is no model.
        OSError: a file is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--task: expected the package lm-eval. Found none. Type: pip install 'lm-eval[hf]'")
    read = [read_task(file) for file in tasks]
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import metric_registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for file, task in zip(tasks, read, strict=True):
        _check_metrics(file, task, [name for name in _metrics(task) if name not in metric_registry])
    model, tokenizer = opened(saved, base)
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=read,
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        apply_chat_template=chat,
        log_samples=False,
        bootstrap_iters=0,
    )
    return {name: _numbers(values) for name, values in found["results"].items()}


def read_task(file: Path) -> Task:
    """A task's settings, with the paths of its rows made absolute.

    Raises:
        ValueError: it asks for anything but files of this machine.
        OSError: the file, or one that it names, is missing.
    """
    import yaml

    try:
        task = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file}: expected plain YAML; a tag such as !function runs code. Found: {reason}"
        ) from error
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise ValueError(f"{file}: expected the settings of one task, with its name in `task`. Found none.")
    if unknown := sorted(str(key) for key in task.keys() - _KEYS):
        raise ValueError(
            f"{file}: expected settings of a task that lies in files. Found {', '.join(unknown)}. "
            f"Known are {', '.join(sorted(_KEYS))}."
        )
    if task.get("dataset_path") not in _READERS:
        raise ValueError(
            f"{file}: dataset_path: expected {', '.join(_READERS)}: nothing is fetched from a hub. "
            f"Found {task.get('dataset_path')!r}. Name the rows in dataset_kwargs.data_files."
        )
    settings = task.get("dataset_kwargs")
    if not isinstance(settings, dict) or settings.keys() != {"data_files"}:
        raise ValueError(f"{file}: dataset_kwargs: expected data_files alone. Found {settings!r}.")
    return task | {"dataset_kwargs": {"data_files": _located(file, settings["data_files"])}}


def _located(file: Path, named: Any) -> Any:
    """Files as a task names them, one or several, or by split; from where the task lies."""
    if isinstance(named, dict):
        return {split: _located(file, each) for split, each in named.items()}
    if isinstance(named, list):
        return [_located(file, each) for each in named]
    rows = (file.parent / str(named)).resolve()
    if not rows.is_file():
        raise FileNotFoundError(f"{file}: data_files: expected a file. Found none at {rows}.")
    return str(rows)


def _metrics(task: Task) -> list[str]:
    return [str(each.get("metric")) for each in task.get("metric_list") or []]


def _check_metrics(file: Path, task: Task, unknown: list[str]) -> None:
    """The harness looks for others on a hub, and runs what it finds."""
    unknown += [str(each["metric"]) for each in task.get("metric_list") or [] if each.get("hf_evaluate")]
    if unknown:
        raise ValueError(f"{file}: metric_list: expected the harness's own. Found {', '.join(unknown)}.")


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Metrics alone, without the name of a filter that is none; there is no error without a bootstrap."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    }
