"""Tasks of lm-evaluation-harness: what is refused before it is asked, and what it measures where it is."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvflare_llm_components.cli import app
from nvflare_llm_components.tools.harness import read_task, run_tasks
from tests.tiny import save_tiny_model

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ROW = {"question": "The capital of Italy is", "choices": [" Rome", " Oslo"], "answer": 0}


def task_file(folder: Path, text: str = TASK) -> Path:
    (folder / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 3)
    (folder / "task.yaml").write_text(text)
    return folder / "task.yaml"


def test_rows_are_found_from_where_the_task_lies(tmp_path: Path):
    task = read_task(task_file(tmp_path))
    assert task["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    assert task["metric_list"] == [{"metric": "acc"}]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("doc_to_target: answer", "doc_to_target: !function utils.answer", "a tag such as !function"),
        ("dataset_path: json", "dataset_path: allenai/ai2_arc", "nothing is fetched from a hub"),
        ("{data_files:", "{trust_remote_code: true, data_files:", "expected data_files alone"),
        ("task: capitals", "task: capitals\ninclude: other.yaml", "Found include"),
        ("task: capitals", "task: capitals\nuse_prompt: all.py", "Found use_prompt"),
        ("task: capitals", "group: capitals", "with its name in `task`"),
        ("rows.jsonl", "others.jsonl", "expected a file"),
        ("rows.jsonl", "https://example.org/rows.jsonl", "expected a file"),
    ],
)
def test_what_is_not_in_files_alone_is_refused(tmp_path: Path, old: str, new: str, reason: str):
    assert old in TASK
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        read_task(task_file(tmp_path, TASK.replace(old, new)))


def test_without_the_harness_the_error_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else object())
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--task", str(task_file(tmp_path))])
    assert done.exit_code != 0
    assert "pip install 'lm-eval[hf]'" in done.output
    neither = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert neither.exit_code != 0
    assert "expected ROWS or --task" in neither.output


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
@pytest.mark.filterwarnings("default")
def test_the_harness_measures_a_saved_model_from_files_alone(tmp_path: Path):
    model = save_tiny_model(tmp_path / "model", chat_template=True)
    found = run_tasks(model, [task_file(tmp_path)], limit=2)
    assert found.keys() == {"capitals"}
    assert found["capitals"]["acc"] in (0.0, 1.0)
    other = task_file(tmp_path, TASK.replace("metric: acc", "metric: accuracy"))
    with pytest.raises(ValueError, match=r"the harness's own\. Found accuracy"):
        run_tasks(model, [other])
