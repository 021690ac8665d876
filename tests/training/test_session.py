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
from nvflare_llm_components.training.rounds import RoundCount
from nvflare_llm_components.training.session import STATE_FOLDER, SFTSession
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.worker import TrainingStoppedError
from tests.training.conftest import SFT

STEPS = 3


@pytest.fixture
def make(model_folder: Path, data_file: Path, tmp_path: Path):
    made: list[SFTSession] = []

    def build(
        name: str = "run",
        sft: dict[str, Any] | None = None,
        rounds: RoundCount | None = None,
        **changes: Any,
    ) -> SFTSession:
        arguments: dict[str, Any] = {"local_steps": STEPS, "eval_data": data_file} | changes
        settings = TrainingSettings(
            model_name_or_path=str(model_folder),
            train_data=data_file,
            sft_config=SFT | (sft or {}),
            **arguments,
        )
        session = SFTSession(settings, tmp_path / name, rounds=rounds)
        made.append(session)
        return session

    yield build
    for session in made:
        session.close()


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def rates(folder: Path) -> list[float]:
    return [line["learning_rate"] for line in lines_of(folder, "train")]


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


def test_what_the_live_weights_are_is_no_matter_of_how_many_rounds_there_were(make, tmp_path):
    def known(session: SFTSession) -> tuple[bool, bool]:
        return session.is_of_federation, session.has_own_result

    first = make(checkpoint="always")
    first.load(first.snapshot())  # as to evaluate it
    assert known(first) == (False, False)
    first.begin_round(0, 2, bool)
    first.keep(first.train_round(), {}, first.present())
    assert known(first) == (True, True)
    first.close()
    assert known(make(checkpoint="never", rounds=first.rounds)) == (False, False)
    assert known(make(checkpoint="always", rounds=first.rounds)) == (False, True)
    (file,) = (tmp_path / "run" / STATE_FOLDER).glob("*/progress.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_processes": 2}))
    assert known(make(checkpoint="always", rounds=first.rounds)) == (False, False)


def test_an_unknown_number_of_rounds_grows_with_them(make, tmp_path):
    run_rounds(make(), range(3), None)
    assert rates(tmp_path / "run")[-1] == pytest.approx(SFT["learning_rate"] / (3 * STEPS))


def test_a_continued_job_spans_its_own_rounds(make, tmp_path):
    run_rounds(make(), range(5, 7), 2)
    found = rates(tmp_path / "run")
    assert found[0] == pytest.approx(SFT["learning_rate"])
    assert found[-1] == pytest.approx(SFT["learning_rate"] / (2 * STEPS))


def train_some(session: SFTSession, numbers: list[int], num_rounds: int | None, folder: Path) -> list[float]:
    """Rounds ``numbers`` of a job that begins at 0; returns the learning rates after the last round's end."""
    for number in numbers:
        session.begin_round(number, num_rounds, bool, first_round=0)
        session.record(session.train_round(), 0.0)
    return rates(folder)


@pytest.mark.parametrize("budget", [{"local_steps": STEPS}, {"local_steps": None, "local_epochs": 0.5}])
@pytest.mark.parametrize("numbers", [[0, 3, 4], [2, 4], [4]], ids=["away", "sampled", "late"])
def test_a_site_that_misses_rounds_ends_where_the_others_end(numbers, budget, make, tmp_path, caplog):
    all_rates = train_some(make("all", **budget), list(range(5)), 5, tmp_path / "all")
    rounds = [line["round"] for line in lines_of(tmp_path / "all", "train")]
    with caplog.at_level(logging.WARNING):
        found = train_some(make("some", **budget), numbers, 5, tmp_path / "some")
    assert found == [rate for rate, number in zip(all_rates, rounds, strict=True) if number in numbers]
    missed = [line["missed_rounds"] for line in lines_of(tmp_path / "some", "round")]
    assert sum(missed) == 5 - len(numbers)
    assert f"missed {max(missed)} rounds of the federation" in caplog.text


def test_a_sites_own_rounds_may_be_chosen_for_the_schedule(make, tmp_path):
    found = train_some(make(schedule="site"), [1, 4], 5, tmp_path / "run")
    assert found == pytest.approx([SFT["learning_rate"] * (1 - step / 15) for step in range(6)])


def test_a_new_process_misses_what_the_lost_one_missed(make, tmp_path):
    """The schedule's lead is part of the state."""

    def train(session: SFTSession, number: int) -> None:
        session.begin_round(number, 6, bool, first_round=0)
        session.keep(session.train_round(), {}, session.present())
        session.settle()

    whole = make("whole")
    for number in (0, 2, 3, 5):
        train(whole, number)
        session = make("parts")
        train(session, number)
        session.close()
    assert rates(tmp_path / "parts") == rates(tmp_path / "whole")


def test_after_a_failure_without_a_state_the_schedule_goes_on(make, tmp_path):
    first = make(checkpoint="never", schedule="site")
    train_some(first, [0, 1], 4, tmp_path / "run")
    first.close()
    again = make(checkpoint="never", schedule="site", rounds=first.rounds)
    assert again.rounds_lost == 2
    found = train_some(again, [2], 4, tmp_path / "run")
    assert found == pytest.approx([SFT["learning_rate"] * (1 - step / 12) for step in range(9)])


def test_what_trl_logs_beside_the_loss_is_kept(make, tmp_path):
    session = make()
    session.begin_round(0, 1, bool)
    session.evaluate()
    session.train_round()
    for line in lines_of(tmp_path / "run", "train"):
        assert min(line["entropy"], line["grad_norm"]) > 0 <= line["mean_token_accuracy"]
    assert lines_of(tmp_path / "run", "eval")[0]["eval_mean_token_accuracy"] >= 0


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
    model = weakref.ref(session._engine.trainer.model)
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
