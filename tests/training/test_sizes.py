"""A model's size is told before it is loaded."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.training.model import load_model
from nvflare_llm_components.training.sizes import size_of
from tests.families.configs import FAST, tiny_config


@pytest.mark.parametrize("family", FAST)
def test_it_is_what_the_loaded_model_takes(family: str, tmp_path: Path):
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path)
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        loaded = load_model(str(tmp_path), {"dtype": dtype})
        expected = sum(itemsize * parameter.numel() for parameter in loaded.parameters())
        assert size_of(str(tmp_path), {"dtype": dtype}).num_bytes == expected


def test_a_quantized_model_takes_less_but_not_its_embeddings(tmp_path: Path):
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model.save_pretrained(tmp_path)
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    layers = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    for key, size in (("load_in_4bit", 0.5), ("load_in_8bit", 1)):
        found = size_of(str(tmp_path), {"quantization_config": {key: True}}).num_bytes
        assert found == whole - (4 - size) * layers


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        size_of(str(tmp_path), {})
