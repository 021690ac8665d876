"""What a kind of adapter needs, the same on both sides."""

import pytest

from nvflare_llm_components.tensors.adapters import adapter_config
from nvflare_llm_components.tensors.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")


def test_an_adapter_says_what_kind_of_model_it_is_for():
    assert adapter_config({"peft_type": "LORA"}).task_type == "CAUSAL_LM"


@pytest.mark.parametrize("given", [None, True, False])
def test_what_is_made_again_from_a_seed_travels_only_where_asked(given: bool | None):
    config = adapter_config({"peft_type": "VERA", "save_projection": given})
    assert config.save_projection is bool(given)


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
