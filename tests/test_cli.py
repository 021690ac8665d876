import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvflare_llm_components.cli import app

JOB_CONFIGS = Path(__file__).parents[1] / "job_configs"


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def dolly(tmp_path):
    file = tmp_path / "raw.jsonl"
    rows = [{"instruction": f"ask {i}", "context": "", "response": f"say {i}"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_prepare_says_what_it_wrote(run, dolly, tmp_path):
    result = run("prepare", "dolly", dolly, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert f"{tmp_path / 'out/training.jsonl'}: 16 rows" in result.output
    assert (tmp_path / "out/validation.jsonl").is_file()


def test_partition_says_what_it_wrote(run, dolly, tmp_path):
    result = run("partition", dolly, "--sites", 2, "--out", tmp_path)
    assert result.exit_code == 0
    assert f"{tmp_path / 'site-2/raw.jsonl'}: 10 rows" in result.output


def test_allow_says_what_it_did_and_does_it_once(run, tmp_path):
    assert "added 'nvflare_llm_components.'" in run("allow", tmp_path).output
    again = run("allow", tmp_path)
    assert again.exit_code == 0
    assert "nothing changed" in again.output


def test_every_verb_is_listed(run):
    output = run("--help").output
    for verb in ("prepare", "partition", "allow", "demo", "baseline", "plot", "sizes", "traffic", "resume"):
        assert f" {verb} " in output


def test_plot_says_which_runs_it_drew(run, tmp_path):
    folder = tmp_path / "central"
    folder.mkdir()
    lines = [{"kind": "train", "step": 1, "loss": 2.0, "learning_rate": 0.1}]
    lines += [{"kind": "round", "round": 0, "start_step": 0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("plot", folder, "-o", tmp_path / "curves.png")
    assert result.output.strip() == f"{tmp_path / 'curves.png'}: central"


def test_a_failed_job_has_code_1(run, tmp_path, monkeypatch):
    monkeypatch.setattr("nvflare_llm_components.tools.shell._PROGRAMS", {"nvflare-llm": "no_such_module"})
    for name in ("dolly.jsonl", "alpaca.json", "oasst1-train.json"):
        (tmp_path / name).touch()
    result = run("demo", "--raw", tmp_path, "--out", tmp_path / "out", "--jobs", JOB_CONFIGS)
    assert result.exit_code == 1
    assert "No module named no_such_module" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["plot", "nowhere"],
        ["baseline", "nowhere", "--sites", "a", "--out", "x"],
        ["traffic", "nowhere"],
        ["resume", "nowhere", "--out", "x"],
        ["demo", "--jobs", "nowhere"],
    ],
)
def test_a_missing_run_or_job_is_one_error_and_code_2(run, command):
    result = run(*command)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert "nowhere" in result.stderr


@pytest.mark.parametrize("command", [["prepare", "squad", "x.jsonl"], ["prepare", "dolly", "none.jsonl"]])
def test_a_users_mistake_is_one_sentence_and_code_2(run, tmp_path, command):
    result = run(*command, "--out", tmp_path)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("Error: ")


def test_help_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets', 'matplotlib', 'nvflare', 'pandas'}"
    code = f"import sys, nvflare_llm_components.cli; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
