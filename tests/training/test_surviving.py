"""A process that is lost and started again sends what it would have sent."""

import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvflare_llm_components.training import weights
from nvflare_llm_components.training.session import STATE_FOLDER, SFTSession
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.state import StateFolder
from tests.training.conftest import LORA, SFT

NUM_ROUNDS = 3
CASES = {
    "sft-mid-epoch": ({"local_steps": 4}, None, {"gradient_accumulation_steps": 1, "logging_steps": 1}),
    "lora-epochs": ({"local_epochs": 1}, LORA, {"gradient_accumulation_steps": 2, "logging_steps": 2}),
}


def settings_of(model: Path, data: Path, case: str, **changes: Any) -> TrainingSettings:
    local, peft, sft = CASES[case]
    return TrainingSettings(
        model_name_or_path=str(model),
        train_data=data,
        eval_data=data,
        sft_config=SFT | {"lr_scheduler_type": "cosine"} | sft,
        peft_config=peft,
        **(local | changes),
    )


def one_round(
    session: SFTSession, number: int, given: weights.StateDict, wait: bool = True
) -> weights.StateDict:
    session.load(given)
    session.begin_round(number, NUM_ROUNDS, bool)
    metrics = session.evaluate()
    report = session.train_round()
    sent = session.snapshot()
    session.keep(report, metrics, session.present())
    if wait:
        session.settle()
    return sent


def mixed(sent: weights.StateDict) -> weights.StateDict:
    """A global model that differs from what the site sent, as with other sites."""
    return {name: value * 0.9 for name, value in sent.items()}


def persistent(settings: TrainingSettings, folder: Path) -> list[weights.StateDict]:
    session = SFTSession(settings, folder)
    sent = [session.snapshot()]
    for number in range(NUM_ROUNDS):
        sent.append(one_round(session, number, mixed(sent[-1])))
    session.close()
    return sent


def logged(folder: Path) -> list[str]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line.rpartition(', "time"')[0] for line in lines if '"train"' in line]


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_for_each_task_changes_nothing(case, model_folder, data_file, tmp_path):
    expected = persistent(settings_of(model_folder, data_file, case), tmp_path / "one")
    for number in range(NUM_ROUNDS):
        torch.manual_seed(number)  # another process has another random state
        session = SFTSession(settings_of(model_folder, data_file, case), tmp_path / "many")
        sent = one_round(session, number, mixed(expected[number]))
        session.close()
        assert not [name for name in sent if not torch.equal(sent[name], expected[number + 1][name])], number
    assert logged(tmp_path / "many") == logged(tmp_path / "one")


ROUND_IN_A_PROCESS = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from tests.training.test_surviving import one_round, settings_of
from nvflare_llm_components.training.session import SFTSession
model, data, folder, number, given, sent = sys.argv[1:]
session = SFTSession(settings_of(Path(model), Path(data), "sft-mid-epoch"), Path(folder))
save_file(one_round(session, int(number), load_file(given)), sent)
session.close()
"""


def test_a_killed_process_sends_what_it_would_have_sent(model_folder, data_file, tmp_path):
    settings = settings_of(model_folder, data_file, "sft-mid-epoch")
    expected = persistent(settings, tmp_path / "one")
    session = SFTSession(settings, tmp_path / "killed")
    one_round(session, 0, mixed(expected[0]))
    session.close()
    given, sent = tmp_path / "given.safetensors", tmp_path / "sent.safetensors"
    save_file(mixed(expected[1]), given)
    arguments = [model_folder, data_file, tmp_path / "killed", 1, given, sent]
    command = [sys.executable, "-c", ROUND_IN_A_PROCESS, *map(str, arguments)]
    # Sums have the bits of their number of threads, which an earlier test of this process may have changed.
    environ = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.Popen(command, env=environ)
    while '"train", "step": 5, "round": 1' not in (tmp_path / "killed" / "metrics.jsonl").read_text():
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not sent.exists()
    subprocess.run(command, check=True, timeout=120, capture_output=True, env=environ)
    found = load_file(sent)
    assert not [name for name in found if not torch.equal(found[name], expected[2][name])]


def test_a_round_trained_but_not_sent_is_sent_again(model_folder, data_file, tmp_path):
    settings = settings_of(model_folder, data_file, "lora-epochs")
    first = SFTSession(settings, tmp_path)
    given = mixed(first.snapshot())
    sent = one_round(first, 0, given)
    first.close()
    again = SFTSession(settings, tmp_path)
    again.load(given)
    report, metrics = again.kept_round(0) or pytest.fail("the round was forgotten")
    assert report.num_steps > 0
    assert metrics["eval_loss"] > 0
    assert all(torch.equal(value, sent[name]) for name, value in again.snapshot().items())
    assert again.kept_round(1) is None
    again.load(mixed(given))
    assert again.kept_round(0) is None
    again.close()


def test_the_disk_holds_one_state_and_a_broken_one_never_counts(tmp_path):
    states = StateFolder(tmp_path)
    assert states.latest() is None

    def broken(folder: Path) -> None:
        (folder / "optimizer.pt").write_text("half")
        raise OSError("disk full")

    states.write(9, lambda folder: folder.joinpath("a").touch())
    with pytest.raises(OSError, match="disk full"):
        states.write(10, broken)
    assert states.latest() == tmp_path / "step-9"
    states.write(10, lambda folder: folder.joinpath("b").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["step-10"]


DAMAGED = {
    "no JSON": lambda text: text[:-9],
    "no object": lambda _: "[]",
    "nested": lambda _: "[" * 10**5,
    "no rounds": lambda text: text.replace('"rounds"', '"r"'),
    "a count below zero": lambda text: text.replace('"done": 1', '"done": -1000000'),
    "an unknown count": lambda text: text.replace('"done"', '"passed"'),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_none(damage, model_folder, data_file, tmp_path, caplog):
    settings = settings_of(model_folder, data_file, "lora-epochs")
    session = SFTSession(settings, tmp_path)
    given = session.snapshot()
    one_round(session, 0, given)
    session.close()
    (file,) = (tmp_path / STATE_FOLDER).glob("*/progress.json")
    file.write_text(DAMAGED[damage](file.read_text()))
    again = SFTSession(settings, tmp_path)
    assert "is damaged" in caplog.text
    assert (again.rounds.done, again.has_own_result) == (0, False)
    one_round(again, 0, given)
    again.close()
    last = SFTSession(settings, tmp_path)
    assert last.rounds.done == 1
    last.close()


@pytest.mark.parametrize(
    ("checkpoint", "wait", "written"), [("never", True, []), ("always", False, ["step-3"])]
)
def test_checkpoint_says_whether_state_is_on_disk_when_the_task_ends(
    checkpoint, wait, written, model_folder, data_file, tmp_path
):
    settings = settings_of(model_folder, data_file, "lora-epochs", checkpoint=checkpoint)
    session = SFTSession(settings, tmp_path)
    one_round(session, 0, session.snapshot(), wait=wait)
    assert [path.name for path in (tmp_path / STATE_FOLDER).glob("step-*")] == written
    session.close()


def test_the_state_of_an_idle_site_is_whole_before_its_next_round(model_folder, data_file, tmp_path):
    session = SFTSession(settings_of(model_folder, data_file, "lora-epochs"), tmp_path)
    sent = one_round(session, 0, session.snapshot(), wait=False)
    session.load(sent)
    assert StateFolder(tmp_path / STATE_FOLDER).latest() == tmp_path / STATE_FOLDER / "step-3"
    session.close()
    session.forget()
    assert not (tmp_path / STATE_FOLDER).exists()


def test_a_full_disk_is_logged_and_the_training_goes_on(model_folder, data_file, tmp_path, caplog):
    session = SFTSession(settings_of(model_folder, data_file, "sft-mid-epoch"), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with caplog.at_level(logging.ERROR):
            sent = one_round(session, 0, session.snapshot())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in caplog.text
    assert StateFolder(tmp_path / STATE_FOLDER).latest() is None
    one_round(session, 1, sent)
    assert StateFolder(tmp_path / STATE_FOLDER).latest()
    session.close()
