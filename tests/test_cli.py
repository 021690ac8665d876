import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from nvflare_llm_components.cli import app


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
