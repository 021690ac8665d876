"""What a round may ask: more rounds than planned, a later start, a reset optimizer, FedProx, an abort."""

import gc
import json
import logging
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from nvflare_llm_components.training import weights
from nvflare_llm_components.training.session import STATE_FOLDER, SFTSession
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.worker import TrainingStoppedError
from tests.training.conftest import SFT

STEPS = 3


@pytest.fixture
def make(model_folder: Path, data_file: Path, tmp_path: Path):
    made: list[SFTSession] = []

    def build(name: str = "run", sft: dict[str, Any] | None = None, **changes: Any) -> SFTSession:
        arguments: dict[str, Any] = {"local_steps": STEPS, "eval_data": data_file} | changes
        settings = TrainingSettings(
            model_name_or_path=str(model_folder),
            train_data=data_file,
            sft_config=SFT | (sft or {}),
            **arguments,
        )
        session = SFTSession(settings, tmp_path / name)
        made.append(session)
        return session

    yield build
    for session in made:
        session.close()


def rates(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if line["kind"] == "train"]


def run_rounds(
    session: SFTSession, numbers: range, num_rounds: int | None, **options: Any
) -> weights.StateDict:
    for number in numbers:
        session.begin_round(number, num_rounds, bool)
        session.train_round(**options)
    return session.snapshot()


def test_more_rounds_than_planned_stretch_the_schedule(make, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run_rounds(make(), range(2), 1)
    peak = SFT["learning_rate"]
    planned = [peak * (1 - step / STEPS) for step in range(STEPS)]
    stretched = [peak * (1 - step / (2 * STEPS)) for step in range(STEPS, 2 * STEPS)]
    assert rates(tmp_path / "run") == pytest.approx(planned + stretched)
    assert "stretched to 6" in caplog.text


def test_an_unknown_number_of_rounds_grows_with_them(make, tmp_path):
    run_rounds(make(), range(3), None)
    assert rates(tmp_path / "run")[-1] == pytest.approx(SFT["learning_rate"] / (3 * STEPS))


def test_a_continued_job_spans_its_own_rounds(make, tmp_path):
    run_rounds(make(), range(5, 7), 2)
    found = rates(tmp_path / "run")
    assert found[0] == pytest.approx(SFT["learning_rate"])
    assert found[-1] == pytest.approx(SFT["learning_rate"] / (2 * STEPS))


def test_optimizer_state_is_kept_or_reset(make):
    schedule = {"lr_scheduler_type": "constant"}
    kept = run_rounds(make("keep", schedule), range(2), 2)
    reset = run_rounds(make("reset", schedule, optimizer_state="reset"), range(2), 2)
    first = run_rounds(make("first", schedule), range(1), 2)
    # Adam's first step after a reset moves each weight by the learning rate's order, whatever came before.
    assert any(not torch.equal(kept[name], reset[name]) for name in kept)
    assert any(not torch.equal(first[name], reset[name]) for name in kept)


def distance(one: weights.StateDict, other: weights.StateDict) -> float:
    return float(sum((one[name] - other[name]).square().sum() for name in one))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fedprox_pulls_towards_the_global_model(accumulation, make):
    sft = {"gradient_accumulation_steps": accumulation, "optim": "sgd", "max_grad_norm": 0.0}
    start = make("start", sft).snapshot()
    free = run_rounds(make("free", sft), range(1), 1)
    pulled = run_rounds(make("pulled", sft), range(1), 1, proximal_mu=20.0)
    assert distance(pulled, start) < 0.9 * distance(free, start)


def test_abort_ends_within_a_step_and_frees_the_model(make, tmp_path):
    session = make(local_steps=10**6, checkpoint="always")
    model = weakref.ref(session._trainer.model)
    asked = threading.Event()
    session.begin_round(0, 1, asked.is_set)
    timer = threading.Timer(0.5, asked.set)
    timer.start()
    with pytest.raises(TrainingStoppedError):
        session.train_round()
    timer.join()
    started = time.monotonic()
    session.close()
    gc.collect()
    assert time.monotonic() - started < 5
    assert model() is None
    assert "nvflare-llm-training" not in [thread.name for thread in threading.enumerate()]
    assert not list((tmp_path / "run" / STATE_FOLDER).glob("*"))


def test_an_abort_ends_an_evaluation(make):
    session = make()
    session.begin_round(0, 1, bool)
    with pytest.raises(TrainingStoppedError):
        session.evaluate(lambda: True)


def test_an_exception_in_the_training_thread_reaches_the_caller(make):
    session = make(sft={"lr_scheduler_type": "warmup_stable_decay"})  # needs lr_scheduler_kwargs
    with pytest.raises(TypeError, match="num_decay_steps"):
        run_rounds(session, range(1), 1)


def test_evaluating_between_rounds_changes_nothing(make):
    plain = run_rounds(make("plain"), range(2), 2)
    watched = make("watched")
    for number in range(2):
        watched.begin_round(number, 2, bool)
        watched.evaluate()
        torch.rand(3)
        watched.train_round()
    found = watched.snapshot()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
