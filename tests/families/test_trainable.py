"""Full fine-tuning with frozen parts: only what trains travels, and the saved folder is whole."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nvflare_llm_components.checkpoint.initial_model import load_initial_model
from nvflare_llm_components.checkpoint.weight_files import map_weights
from nvflare_llm_components.tensors.errors import CheckpointError
from tests.families.configs import tiny_config
from tests.families.federation import NUM_ROUNDS, Server, average, open_site, train
from tests.tiny import tiny_tokenizer

TRAINABLE = ["model.layers.1.*", "model.norm.weight"]


def save_source(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_only_what_trains_travels(family: str, save_dtype: str | None, tmp_path: Path):
    source = save_source(family, tmp_path / "source")
    job = {"model_name_or_path": str(source), "trainable": TRAINABLE, "save_dtype": save_dtype}
    server = Server.start(tmp_path / "server", **job)
    whole, names = map_weights(source), set(server.weights)
    assert names == {name for name in whole if ".layers.1." in name or name == "model.norm.weight"}
    sites = [open_site(tmp_path / name, source, name, trainable=TRAINABLE) for name in ("one", "two")]
    for round_number in range(NUM_ROUNDS):
        results = [train(site, server.weights, round_number) for site in sites]
        assert all(set(result) == names for result in results)
        server.save(average(results), round_number)
        assert set(server.weights) == names
    saved = map_weights(server.last)
    assert saved.keys() == whole.keys()
    exact = save_dtype is None
    assert all(torch.equal(saved[name], whole[name].to(saved[name].dtype)) for name in whole.keys() - names)
    assert all(torch.equal(saved[name], value) for name, value in server.weights.items() if exact)
    assert any(not torch.equal(saved[name], whole[name].to(saved[name].dtype)) for name in names)
    sites[0].load(server.weights)
    live = sites[0]._engine.trainer.model.state_dict()
    opened = AutoModelForCausalLM.from_pretrained(server.last).state_dict()
    assert all(torch.equal(opened[name], live[name].to(opened[name].dtype)) for name in opened)
    again = Server.start(tmp_path / "server", "job-2", **job, resume_from=str(server.last.parent.parent))
    assert again.weights.keys() == names
    assert all(torch.equal(again.weights[name], value) for name, value in server.weights.items())
    for site in sites:
        site.close()


def test_an_adapter_says_itself_what_trains(tmp_path: Path):
    source = save_source("llama", tmp_path)
    with pytest.raises(CheckpointError, match="trainable: expected a whole model, found an adapter"):
        load_initial_model(str(source), {"peft_type": "LORA"}, 0, ["*"])
