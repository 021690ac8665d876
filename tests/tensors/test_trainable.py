"""Patterns of what trains: by names of the checkpoint, on a server's meta model as on a live one."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.names import meta_model, model_tensors
from nvflare_llm_components.tensors.trainable import trained_parameters
from tests.families.configs import FAST, tiny_config


def meta(family: str):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


def test_a_pattern_names_tensors_of_the_checkpoint():
    found = trained_parameters(meta("llama"), ["model.layers.1.*", "*.norm.weight"])
    assert set(found) == {name for [name] in found.values()}
    assert {name.split(".")[2] for name in found if "layers" in name} == {"1"}
    assert "model.norm.weight" in found
    assert "lm_head.weight" not in found


@pytest.mark.parametrize("family", FAST)
def test_a_star_is_every_parameter_on_both_sides(family: str, tmp_path: Path):
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    model.save_pretrained(tmp_path)
    found = trained_parameters(model, ["*"])
    assert found == trained_parameters(meta_model(tmp_path), ["*"])
    buffers = model_tensors(tmp_path).shapes.keys() - {name for names in found.values() for name in names}
    assert all("bias" in name or "inv_freq" in name for name in buffers)


def test_a_stacked_parameter_trains_whole_where_one_piece_matches():
    found = trained_parameters(meta("mixtral"), ["*layers.0.*experts.3.w1.weight"])
    [(name, pieces)] = found.items()
    assert "experts" in name
    assert len(pieces) == 24, "gate and up of 12 experts are one parameter"


@pytest.mark.parametrize("pattern", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_trains_by_each_of_its_names(pattern: str):
    assert trained_parameters(meta("gemma"), [pattern]) == {
        "model.embed_tokens.weight": ["model.embed_tokens.weight"]
    }


@pytest.mark.parametrize("patterns", [[], "model.*", None, ["a"] * 101, ["a" * 201], [""], [1], {"a": 1}, 3])
def test_what_is_no_short_list_of_short_texts_is_refused(patterns: object):
    with pytest.raises(CheckpointError, match="trainable: expected 1 to 100 patterns"):
        trained_parameters(meta("llama"), patterns)


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(CheckpointError, match=r"found \['layers\.1\.\*'\] that match none of 21, such as"):
        trained_parameters(meta("llama"), ["model.*", "layers.1.*"])


def test_a_hostile_pattern_ends_soon():
    started = time.process_time()
    with pytest.raises(CheckpointError, match="match none"):
        trained_parameters(meta("llama"), ["*e" * 100, "*[!a]" * 40, "[" * 200])
    assert time.process_time() - started < 10
