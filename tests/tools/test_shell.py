import io
import json

import pytest
from rich.console import Console

from nvflare_llm_components.components import COMPONENTS
from nvflare_llm_components.tools.federation import check
from nvflare_llm_components.tools.shell import CommandError, Shell, tail


@pytest.fixture
def shell():
    return Shell(Console(file=io.StringIO(), width=200), {"NVFLARE_LLM_DATA": "/a b"})


def printed(shell: Shell) -> str:
    return shell.console.file.getvalue()


def write_run(workspace, site, records):
    file = workspace / site / "simulate_job/metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def rounds(count: int) -> list[dict]:
    return [{"kind": "round", "round": number, "num_steps": 5, "train_loss": 1.0} for number in range(count)]


def write_model(workspace, round_number: int) -> None:
    folder = workspace / "server/simulate_job/global_model/last"
    folder.mkdir(parents=True)
    (folder / "federation.json").write_text(json.dumps({"round": round_number}))


def test_a_command_is_echoed_as_typed_and_its_output_logged(shell, tmp_path):
    seconds = shell.run(["nvflare-llm", "allow", str(tmp_path / "ws"), "--new"], tmp_path / "log.txt")
    assert seconds > 0
    assert f"$ nvflare-llm allow {tmp_path / 'ws'}" in printed(shell)
    assert f"added {len(COMPONENTS)} classes" in (tmp_path / "log.txt").read_text()


def test_exported_variables_can_be_pasted(shell):
    shell.export()
    assert "$ export NVFLARE_LLM_DATA='/a b'" in printed(shell)


def test_a_failing_command_shows_the_end_of_its_log(shell, tmp_path):
    with pytest.raises(CommandError, match=r"exit code 2(.|\n)*Found no file") as error:
        shell.run(["nvflare-llm", "prepare", "dolly", "none.jsonl", "--out", "x"], tmp_path / "log.txt")
    assert str(tmp_path / "log.txt") in str(error.value)


def test_a_command_that_hangs_is_ended(tmp_path):
    hurried = Shell(Console(file=io.StringIO()), {}, timeout_s=0.0)
    with pytest.raises(CommandError, match="did not end in time"):
        hurried.run(["nvflare-llm", "--help"], tmp_path / "log.txt")


def test_a_complete_run_is_accepted(tmp_path):
    write_run(tmp_path, "a", rounds(2))
    write_model(tmp_path, 1)
    check(tmp_path, ["a"], 2)


def test_a_site_that_died_is_named_with_the_end_of_its_log(tmp_path):
    write_run(tmp_path, "a", rounds(2))
    write_run(tmp_path, "b", rounds(1))
    (tmp_path / "b/error_log.txt").write_text("first\nout of memory\n")
    write_model(tmp_path, 1)
    with pytest.raises(CommandError, match=r"b: expected 2 rounds. Found \[0\](.|\n)*out of memory"):
        check(tmp_path, ["a", "b"], 2)


@pytest.mark.parametrize("saved", [None, 0])
def test_a_run_without_the_last_model_is_refused(tmp_path, saved):
    write_run(tmp_path, "a", rounds(2))
    if saved is not None:
        write_model(tmp_path, saved)
    with pytest.raises(CommandError, match=f"expected the model of round 1. Found {saved}"):
        check(tmp_path, ["a"], 2)


def test_tail_of_a_missing_log_says_so(tmp_path):
    assert tail(tmp_path / "none.txt") == "(no such file)"
