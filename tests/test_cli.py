import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nvflare_llm_components.cli import app
from nvflare_llm_components.cli.app import PANELS

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


def test_prepare_without_a_set_says_what_to_type(run, dolly, tmp_path):
    result = run("prepare", dolly, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.strip().endswith(f"nvflare-llm prepare own {dolly} --out {tmp_path / 'out'}")


def test_partition_says_what_it_wrote(run, dolly, tmp_path):
    result = run("partition", dolly, "--sites", 2, "--out", tmp_path)
    assert result.exit_code == 0
    assert f"{tmp_path / 'site-2/raw.jsonl'}: 10 rows" in result.output


def test_allow_says_what_it_did_and_does_it_once(run, tmp_path):
    assert "nvflare_llm_components.executors.HFSFTExecutor" in run("allow", tmp_path, "--new").output
    again = run("allow", tmp_path)
    assert again.exit_code == 0
    assert "nothing changed" in again.output


def test_what_several_kits_lack_is_listed_once(run, tmp_path):
    for name in ("server", "site-1"):
        (tmp_path / name / "startup").mkdir(parents=True)
        file = "fed_server.json" if name == "server" else "fed_client.json"
        (tmp_path / name / "startup" / file).write_text("{}")
    output = run("allow", tmp_path).output
    assert output.count("HFSFTExecutor") == 1
    assert output.count("resources.json: added") == 2


def test_job_writes_what_was_chosen_and_says_so(run, tmp_path):
    options = ["--sites", "5", "--precision", "int8", "--lora", "r=16", "--quorum", "4", "--evaluate-final"]
    options += ["--lr", "2e-5", "--per-site", "site-3.batch_size=2", "--model", "/m", "--data", "/d"]
    result = run("job", "sft", *options, "--out", tmp_path / "mine")
    assert result.exit_code == 0, result.output
    assert "5 sites" in result.output
    assert f"nvflare-llm check {tmp_path / 'mine'}" in result.output
    server = json.loads((tmp_path / "mine/app/config/config_fed_server.json").read_text())
    assert (server["num_clients"], server["quorum"], server["precision"]) == (5, 4, "int8")
    assert server["peft_config"]["r"] == 16
    client = json.loads((tmp_path / "mine/app_site-3/config/config_fed_client.json").read_text())
    assert (client["batch_size"], client["learning_rate"]) == (2, 2e-5)


def test_choices_can_be_written_edited_and_read_again(run, tmp_path):
    assert run("job", "sft_int8", "--out", tmp_path / "a.toml").exit_code == 0
    text = (tmp_path / "a.toml").read_text()
    (tmp_path / "a.toml").write_text(text.replace("# rounds = 3", "rounds = 7"))
    assert "7 rounds" in run("job", tmp_path / "a.toml", "--out", tmp_path / "job").output


def test_the_help_lists_every_command_once_in_the_order_of_use(run):
    group = typer.main.get_command(app)
    listed = [name for names in PANELS.values() for name in names]
    assert sorted(listed) == sorted(group.commands)
    shown = re.findall(r"^│ ([a-z]+) ", run("--help").output, re.M)
    assert shown == listed


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
        ["job", "nowhere"],
        ["check", "nowhere", "--sites", "a"],
        ["run", "nowhere", "--sites", "a"],
        ["report", "nowhere"],
        ["generate", "nowhere", "--prompt", "?"],
        ["merge", "nowhere", "--out", "x"],
        ["evaluate", "nowhere", "nowhere.jsonl"],
        ["partition", "nowhere", "--sites", "2"],
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
