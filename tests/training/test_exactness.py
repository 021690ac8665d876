"""One client's rounds are one centralized training, bit for bit: weights, losses and learning rates."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_config
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from nvflare_llm_components.training import weights
from nvflare_llm_components.training.model import load_model, load_tokenizer
from nvflare_llm_components.training.rows import load_rows
from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.settings import TrainingSettings
from tests.training.conftest import LORA, SFT

Curve = list[tuple[int, float, float]]
NUM_ROUNDS = 3
BUDGETS = {
    "epoch": ({"local_epochs": 1}, {"num_train_epochs": 3}),
    "fractional": ({"local_epochs": 0.5}, {"num_train_epochs": 1.5}),
    "steps": ({"local_steps": 4}, {"max_steps": 12}),
}
CASES = [
    ("sft", "linear", 0, 1, "epoch"),
    ("sft", "cosine", 2, 2, "fractional"),
    ("sft", "constant", 0, 1, "steps"),
    ("sft", "cosine", 0.25, 1, "epoch"),
    ("lora", "linear", 2, 1, "steps"),
    ("lora", "cosine", 0, 2, "epoch"),
    ("lora", "constant_with_warmup", 2, 1, "fractional"),
]
# Transformers' "constant" knows no warm-up: with one, it has another name.
SCHEDULES = [("constant", 0), ("constant_with_warmup", 2), *product(["linear", "cosine"], [0, 2])]
PRODUCT = [
    (kind, *schedule, accumulation, budget)
    for kind, schedule, accumulation, budget in product(["sft", "lora"], SCHEDULES, [1, 2], BUDGETS)
]


class Curves(TrainerCallback):
    def __init__(self) -> None:
        self.points: Curve = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.points.append((state.global_step, logs["loss"], logs["learning_rate"]))


def sft_config(schedule: str, warmup: float, accumulation: int) -> dict[str, Any]:
    return {
        **SFT,
        "lr_scheduler_type": schedule,
        "warmup_steps": warmup,
        "gradient_accumulation_steps": accumulation,
    }


def centralized(
    model: Path, data: Path, out: Path, config: dict, peft: dict | None, total: dict, kwargs: dict
):
    curves = Curves()
    trainer = SFTTrainer(
        model=load_model(str(model), kwargs),
        args=SFTConfig(
            output_dir=str(out),
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **{"bf16": False, **config},
            **total,
        ),
        train_dataset=load_rows(data, "train_data"),
        processing_class=load_tokenizer(str(model)),
        peft_config=get_peft_config({"task_type": "CAUSAL_LM", **peft}) if peft else None,
        callbacks=[curves],
    )
    trainer.train()
    return weights.snapshot(trainer.model), curves.points


def curve_of(folder: Path) -> Curve:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["learning_rate"]) for line in lines if line["kind"] == "train"]


def erase(session: SFTSession) -> None:
    """Without this a session that loads nothing would pass: its own weights are the global ones."""
    with torch.no_grad():
        for value in session._engine.trainer.model.parameters():
            if value.requires_grad:
                value.zero_()


def federated(
    session: SFTSession, num_rounds: int, first: weights.StateDict | None = None
) -> weights.StateDict:
    sent = first or session.snapshot()
    for number in range(num_rounds):
        session.begin_round(number, num_rounds, bool)
        erase(session)
        session.load(sent)
        if session.has_eval_data:
            session.evaluate()
        session.train_round()
        sent = session.snapshot()
    return sent


def assert_same(found: weights.StateDict, expected: weights.StateDict) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def compare(
    model: Path,
    data: Path,
    folder: Path,
    *,
    config: dict,
    peft: dict | None,
    budget: str,
    kwargs: dict | None = None,
) -> None:
    """Trains once in one call and once in rounds, and compares curves and weights bit for bit."""
    local, total = BUDGETS[budget]
    expected, curve = centralized(model, data, folder / "one", config, peft, total, kwargs or {})
    session = SFTSession(
        TrainingSettings(
            model_name_or_path=str(model),
            train_data=data,
            eval_data=data,
            sft_config=config,
            peft_config=peft,
            model_kwargs=kwargs or {},
            **local,
        ),
        folder / "rounds",
    )
    found = federated(session, NUM_ROUNDS)
    session.close()
    assert len(curve) > NUM_ROUNDS
    assert curve_of(folder / "rounds") == curve
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("kind", "schedule", "warmup", "accumulation", "budget"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in PRODUCT)],
)
def test_rounds_equal_one_call(
    kind, schedule, warmup, accumulation, budget, model_folder, data_file, tmp_path
):
    config = sft_config(schedule, warmup, accumulation)
    peft = LORA if kind == "lora" else None
    compare(model_folder, data_file, tmp_path, config=config, peft=peft, budget=budget)


SAVING = [
    {"gradient_checkpointing": True},
    {"bf16": True, "use_cpu": True},
    {"gradient_checkpointing": True, "bf16": True, "use_cpu": True},
]


@pytest.mark.parametrize("kind", ["sft", "lora"])
@pytest.mark.parametrize("saving", SAVING, ids=lambda saving: "+".join(saving))
def test_what_saves_memory_keeps_rounds_equal(saving, kind, model_folder, data_file, tmp_path):
    config = sft_config("cosine", 2, 1) | saving
    peft = LORA if kind == "lora" else None
    compare(model_folder, data_file, tmp_path, config=config, peft=peft, budget="steps")


def test_checkpoints_change_no_bit(model_folder, data_file, tmp_path):
    config = sft_config("cosine", 2, 1)
    plain, saving = (
        centralized(model_folder, data_file, tmp_path / f"{len(on)}", config | on, None, {"max_steps": 6}, {})
        for on in ({}, {"gradient_checkpointing": True})
    )
    assert plain[1] == saving[1]
    assert_same(saving[0], plain[0])


@pytest.mark.parametrize("budget", ["epoch", "fractional"])
def test_an_epochs_line_belongs_to_the_round_that_ends_it(budget, model_folder, data_file, tmp_path):
    config = sft_config("linear", 0, 1) | {"logging_strategy": "epoch"}
    local, total = BUDGETS[budget]
    _, curve = centralized(model_folder, data_file, tmp_path / "one", config, None, total, {})
    settings = TrainingSettings(
        model_name_or_path=str(model_folder), train_data=data_file, sft_config=config, **local
    )
    session = SFTSession(settings, tmp_path / "rounds")
    federated(session, NUM_ROUNDS)
    session.close()
    assert curve_of(tmp_path / "rounds") == curve
    lines = map(json.loads, (tmp_path / "rounds" / "metrics.jsonl").read_text().splitlines())
    assert [line["round"] for line in lines] == ([0, 1, 2] if budget == "epoch" else [1, 2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "schedule", "warmup", "accumulation", "budget"), CASES)
def test_rounds_equal_one_call_on_a_gpu(
    kind, schedule, warmup, accumulation, budget, dtype, model_folder, data_file, tmp_path
):
    config = sft_config(schedule, warmup, accumulation) | {"full_determinism": True, "bf16": False}
    peft = LORA if kind == "lora" else None
    kwargs = {"dtype": dtype, "attn_implementation": "eager"}
    compare(model_folder, data_file, tmp_path, config=config, peft=peft, budget=budget, kwargs=kwargs)
