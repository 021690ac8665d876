"""One command from a job to a verdict, with the real simulator."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from nvflare_llm_components.jobs.write import chosen, write_job
from nvflare_llm_components.tools.federation import Federation
from nvflare_llm_components.tools.resume import resume_job
from nvflare_llm_components.tools.run import _next, run
from nvflare_llm_components.tools.shell import CommandError
from tests.tiny import save_tiny_model, write_rows, write_site_data

SITES = ["a", "b"]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(save_tiny_model(tmp_path / "model")))
    monkeypatch.setenv("NVFLARE_LLM_DATA", str(write_site_data(tmp_path / "data", SITES)))
    return tmp_path


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=250)


def job(folder: Path, **choices: object) -> Path:
    write_job(chosen("sft_int8", {"sites": "a,b", "rounds": 2, "max_length": 128, **choices}), folder)
    return folder


@pytest.mark.integration
def test_a_job_that_runs_ends_with_its_verdict_and_what_to_type_next(places: Path, console: Console):
    federation = run(job(places / "job"), places / "ws", SITES, console=console)
    lines = console.file.getvalue().splitlines()
    assert lines[-1].startswith("Done: 2 sites, eval loss ")
    assert lines[-1].endswith(f"The model: {federation.model}")
    for command in ("plot", "report", "traffic", "generate"):
        assert any(line.strip().startswith(f"nvflare-llm {command} ") for line in lines)
    assert any("round 2 of 2: eval loss" in line for line in lines)
    final = json.loads((places / "ws/server/simulate_job/final_evaluation.json").read_text())
    assert final["sites"].keys() == set(SITES)
    assert f"-> {final['eval_loss']:.4f}" in lines[-1]
    last_evaluation = {site: each.metrics("eval")[-1]["eval_loss"] for site, each in federation.runs.items()}
    assert final["sites"] == pytest.approx(last_evaluation)


@pytest.mark.integration
def test_a_job_that_fails_at_a_site_ends_with_the_cause(places: Path, console: Console):
    """What no check can see: flash attention is not there where the model is loaded."""
    broken = job(places / "job", model_kwargs={"attn_implementation": "flash_attention_2"})
    with pytest.raises(CommandError) as error:
        run(broken, places / "ws", SITES, console=console)
    last = str(error.value).splitlines()[-1]
    assert last.startswith(("site a: ", "site b: ", "sites a, b: "))
    assert "lash" in last
    # In plain `nvflare simulator`, too, a site's reason comes last.
    log = (places / "ws/server/log.txt").read_text().splitlines()
    error = [line for line in log if " - ERROR - " in line][-1]
    assert re.search(r"site '?[ab]\b", error), error


@pytest.mark.slow
def test_a_run_that_is_ended_from_the_keyboard_says_how_to_go_on(places: Path):
    command = [
        sys.executable,
        "-m",
        "nvflare_llm_components.cli",
        "run",
        str(job(places / "job", rounds=200)),
    ]
    console = places / "console.txt"
    with console.open("w") as output:
        process = subprocess.Popen(
            [*command, "-w", str(places / "ws")], stdout=output, stderr=subprocess.STDOUT
        )
        while "round 1 of 200" not in console.read_text() and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
    last = " ".join(console.read_text().splitlines()[-2:])
    assert re.search(r"Ended by you, with \d+ rounds? done\. To go on: nvflare-llm resume \S+/ws --out", last)
    resume_job(places / "ws", places / "job2")
    assert (places / "job2/meta.json").is_file()


def test_a_model_that_was_trained_on_messages_is_asked_by_its_template(places: Path):
    federation = Federation("job", job(places / "job"), places / "ws", 1.0)
    assert not any("--chat" in line for line in _next(federation, "a"))
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    write_rows(places / "data/a/training.jsonl", [{"messages": turns}])
    assert _next(federation, "a")[-1].endswith("--prompt 'Your question' --chat")


def test_a_job_with_an_error_is_not_started(places: Path, console: Console):
    shutil.rmtree(places / "data/b")
    with pytest.raises(CommandError) as error:
        run(job(places / "job"), places / "ws", SITES, console=console)
    assert str(error.value).splitlines()[-1].startswith("b: train_data: expected a data file")
    assert not (places / "ws").exists()
