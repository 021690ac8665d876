"""The centralized modes: equal where they must be, and a zig-zag where weights are put back."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nvflare_llm_components.training.centralized import MODES, run_baseline
from nvflare_llm_components.training.evaluate import evaluate_model
from nvflare_llm_components.training.settings import TrainingSettings
from tests.training.conftest import SFT

NUM_ROUNDS = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> dict[str, Path]:
    settings = TrainingSettings(
        model_name_or_path=str(model_folder),
        train_data=data_file,
        eval_data=data_file,
        sft_config=SFT | {"lr_scheduler_type": "constant"},
        local_epochs=2,
    )
    made = {mode: tmp_path_factory.mktemp(mode) for mode in MODES}
    for mode, folder in made.items():
        run_baseline(mode=mode, folder=folder, num_rounds=NUM_ROUNDS, settings=settings)
    return made


def values(folder: Path, kind: str, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["kind"] == kind]


def test_iterative_is_one_call(folders):
    one_call, iterative = (load_file(folders[mode] / "model" / "model.safetensors") for mode in MODES[:2])
    assert all(one_call[name].equal(iterative[name]) for name in one_call)
    assert values(folders["one-call"], "train", "loss") == values(folders["iterative"], "train", "loss")


def test_fixed_weights_give_a_zig_zag(folders):
    first, second = values(folders["iterative-fixed"], "eval", "eval_loss")[:NUM_ROUNDS]
    assert first == second
    losses = values(folders["iterative-fixed"], "train", "loss")
    half = len(losses) // NUM_ROUNDS
    assert losses[half] > losses[half - 1] + 0.5
    assert values(folders["iterative"], "eval", "eval_loss")[1] < first - 0.5


def test_the_final_model_opens_with_transformers(folders):
    assert AutoModelForCausalLM.from_pretrained(folders["one-call"] / "model").config.hidden_size == 32


def test_an_unknown_mode_is_refused(tmp_path, model_folder, data_file):
    settings = TrainingSettings(model_name_or_path=str(model_folder), train_data=data_file)
    with pytest.raises(ValueError, match="mode: expected one of one-call"):
        run_baseline(mode="twice", folder=tmp_path, num_rounds=1, settings=settings)


def test_a_saved_model_evaluates_as_it_did_in_training(folders, data_file):
    found = evaluate_model(model_folder=folders["one-call"] / "model", eval_data=data_file, sft_config=SFT)
    assert found["eval_loss"] == values(folders["one-call"], "eval", "eval_loss")[-1]
