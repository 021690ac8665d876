"""Names from a configuration are those of the files; a tied weight may come under each of its names."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.names import (
    aliases_of,
    checkpoint_tensors,
    meta_model,
    model_tensors,
    normalised,
    under_own_names,
)
from nvflare_llm_components.tensors.safetensors_file import map_tensor_file
from tests.families.configs import FAST, tiny_config

ALIASES = {"head": "embed"}


@pytest.mark.parametrize("family", FAST)
def test_a_configuration_a_live_model_and_a_file_agree(family: str, tmp_path: Path):
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    model.save_pretrained(tmp_path)
    in_file = {
        name: tuple(value.shape) for name, value in map_tensor_file(tmp_path / "model.safetensors").items()
    }
    expected = model_tensors(tmp_path)
    assert expected.shapes == in_file
    assert {name: tuple(value.shape) for name, value in checkpoint_tensors(model).items()} == in_file
    assert expected.aliases == aliases_of(model)
    assert not expected.aliases.keys() & in_file.keys()
    assert set(expected.aliases.values()) <= in_file.keys()


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_the_layout_of_the_file_that_was_loaded_does_not_count(family: str, tmp_path: Path):
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(
        tmp_path, save_original_format=False
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert checkpoint_tensors(model).keys() == model_tensors(tmp_path).shapes.keys()


def test_memory_is_the_models_own():
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    live = {value.data_ptr() for value in model.state_dict().values()}
    assert {value.data_ptr() for value in checkpoint_tensors(model).values()} <= live


@pytest.mark.parametrize("convert", [torch.as_tensor, numpy.asarray])
def test_a_tied_weight_is_taken_once(convert):
    weight = convert([1.0, 2.0])
    for values in ({"embed": weight}, {"head": weight}, {"embed": weight, "head": convert([1.0, 2.0])}):
        assert normalised(values, {"embed"}, ALIASES) == {"embed": weight}


def test_a_tied_weight_with_two_values_is_refused_by_name():
    with pytest.raises(CheckpointError, match="head: expected the values of embed"):
        normalised({"embed": torch.ones(2), "head": torch.zeros(2)}, {"embed"}, ALIASES)


def test_an_unknown_name_stays_for_the_caller_to_refuse():
    assert normalised({"x": 1}, {"embed"}, ALIASES) == {"x": 1}


def test_names_of_a_backbone_are_completed_and_unused_buffers_are_left_out(tmp_path: Path):
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    expected = model_tensors(tmp_path)
    found = under_own_names(
        {"norm.weight": 1, "model.layers.0.self_attn.rotary_emb.inv_freq": 2, "other": 3}, expected
    )
    assert found == {"model.norm.weight": 1, "other": 3}


@pytest.mark.parametrize("kind", [str, Path])
def test_an_attention_that_is_not_installed_has_no_say_in_names_and_shapes(kind, tmp_path: Path):
    tiny_config("llama").save_pretrained(tmp_path)
    plain = meta_model(tmp_path).state_dict()
    config = json.loads((tmp_path / "config.json").read_text())
    config["attn_implementation"] = "flash_attention_2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert meta_model(kind(tmp_path)).state_dict().keys() == plain.keys()


def test_what_is_not_installed_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def build(*_: object, **__: object) -> None:
        raise ImportError("needs the package xyz\nand more lines")

    tiny_config("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", build)
    with pytest.raises(CheckpointError, match=r"asks for what is not installed: needs the package xyz$"):
        meta_model(tmp_path)


def test_a_mask_of_all_positions_is_refused_before_it_is_made(tmp_path):
    """Of each layer a square of its positions, which no file holds: 4 GiB of 70 kilobytes."""
    config = {"model_type": "gpt_neo", "vocab_size": 8, "hidden_size": 4, "num_layers": 2, "num_heads": 1}
    config |= {"attention_types": [[["global"], 2]], "max_position_embeddings": 2**16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"expected masks and tables of at most [\d,]+ bytes, found"):
        meta_model(tmp_path)
