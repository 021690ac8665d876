"""What a kind of adapter needs, the same on both sides."""

from pathlib import Path

import pytest
import torch

from nvflare_llm_components.checkpoint.initial_adapter import initial_adapter
from nvflare_llm_components.tensors.adapters import adapter_config, num_adapter_values
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.names import meta_model
from tests.families.adapters import WORKING

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")


def test_an_adapter_says_what_kind_of_model_it_is_for():
    assert adapter_config({"peft_type": "LORA"}).task_type == "CAUSAL_LM"


@pytest.mark.parametrize("given", [None, True, False])
def test_what_is_made_again_from_a_seed_travels_only_where_asked(given: bool | None):
    config = adapter_config({"peft_type": "VERA", "save_projection": given})
    assert config.save_projection is bool(given)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "PiSSA", "IA3", "LoHa", "HRA"])
def test_an_adapters_size_is_told_before_it_is_made(kind: str, model: Path):
    made, _ = initial_adapter(model, "base", WORKING[kind], seed=0)
    buffers = sum(value.numel() for value in meta_model(model).buffers())
    told = num_adapter_values(meta_model(model), WORKING[kind])
    assert (
        sum(value.numel() for value in made.values())
        <= told
        <= buffers + sum(map(torch.numel, made.values()))
    )


@pytest.mark.parametrize("settings", [WORKING["SHiRA"], {"peft_type": "LORA", "target_modules": ["no_such"]}])
def test_a_size_that_only_making_it_tells_is_none(settings: dict[str, object], model: Path):
    assert num_adapter_values(meta_model(model), settings) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 4}, "with a 'peft_type'"),
        ({"peft_type": "NO_SUCH"}, "NO_SUCH"),
        ({"peft_type": "LORA", "no_such_setting": 1}, "no_such_setting"),
        ({"peft_type": "LORA", "init_lora_weights": "eva"}, "come from data"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_" + "9" * 1000}, "random numbers"),
        ({"peft_type": "ADALORA"}, "prune other ranks"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(settings: dict[str, object], words: str):
    with pytest.raises(CheckpointError, match=words) as caught:
        adapter_config(settings)
    assert len(str(caught.value)) < 700
