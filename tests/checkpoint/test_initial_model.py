import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nvflare_llm_components.checkpoint.initial_model import load_initial_model
from nvflare_llm_components.checkpoint.weight_files import map_weights
from nvflare_llm_components.tensors.errors import CheckpointError
from tests.checkpoint.tiny_models import save_tiny_llama, state_of
from tests.families.configs import tiny_config


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_starts_with_each_weight_once_under_its_own_name(tmp_path: Path, tied: bool):
    model = save_tiny_llama(tmp_path, tied=tied)
    start = load_initial_model(str(tmp_path), None, 0)
    assert ("lm_head.weight" in start.weights) is not tied
    assert start.weights.keys() == state_of(model).keys()
    assert all(torch.equal(start.weights[name], value) for name, value in state_of(model).items())
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(
        start.companions
    )


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_weight_saved_twice_or_under_the_other_name_is_taken_once(tmp_path: Path):
    model = save_tiny_llama(tmp_path)
    embeddings = state_of(model)["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda weights: weights.update({"lm_head.weight": embeddings}))
    assert "lm_head.weight" not in load_initial_model(str(tmp_path), None, 0).weights
    rewrite(tmp_path, lambda weights: weights.pop("model.embed_tokens.weight"))
    assert torch.equal(
        load_initial_model(str(tmp_path), None, 0).weights["model.embed_tokens.weight"], embeddings
    )


def test_tied_weights_that_differ_are_refused(tmp_path: Path):
    save_tiny_llama(tmp_path)
    rewrite(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected the values of model\.embed_tokens"):
        load_initial_model(str(tmp_path), None, 0)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "llama"])
def test_a_file_in_another_layout_starts_what_transformers_loads(tmp_path: Path, family: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    model.save_pretrained(tmp_path / "usual")
    expected = map_weights(tmp_path / "usual")
    found = load_initial_model(str(tmp_path / "new"), None, 0).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_names_without_the_backbone_prefix_are_completed(tmp_path: Path):
    model = save_tiny_llama(tmp_path)

    def strip(weights):
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    rewrite(tmp_path, strip)
    assert load_initial_model(str(tmp_path), None, 0).weights.keys() == state_of(model).keys()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("model.norm.weight"), r"1 missing \(model\.norm\.weight\)"),
        (lambda w: w.update({"model.extra": torch.ones(1)}), r"1 unknown \(model\.extra\)"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight \(3,\) instead of \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path, change, sentence: str):
    save_tiny_llama(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=sentence):
        load_initial_model(str(tmp_path), None, 0)


def test_a_folder_without_config_is_named(tmp_path: Path):
    save_tiny_llama(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected the config\.json of a causal language model"):
        load_initial_model(str(tmp_path), None, 0)


@pytest.mark.parametrize("name", [None, "", "{$MODEL}"])
def test_an_unset_variable_is_explained(name: str | None):
    with pytest.raises(CheckpointError, match="environment variable, set that on the server"):
        load_initial_model(name, None, 0)


def test_a_missing_path_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="found nothing at"):
        load_initial_model(str(tmp_path / "nowhere"), None, 0)


def test_a_name_that_no_hub_knows_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no folder on this machine, and the hub gave no such model"):
        load_initial_model("nobody/no-such-model", None, 0)


def test_an_adapter_folder_starts_with_its_tensors(tmp_path: Path):
    save_file({"a.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    start = load_initial_model(str(tmp_path), {"peft_type": "LORA"}, 0)
    assert torch.equal(start.weights["a.lora_A.weight"], torch.ones(2))
    with pytest.raises(CheckpointError, match=r"peft_type IA3.*found one of LORA"):
        load_initial_model(str(tmp_path), {"peft_type": "IA3"}, 0)
