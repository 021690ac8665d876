import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_config, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from nvflare_llm_components.checkpoint.initial_adapter import initial_adapter
from nvflare_llm_components.checkpoint.model_folder import save_model_folder
from nvflare_llm_components.tensors.errors import CheckpointError
from tests.checkpoint.tiny_models import save_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")  # save what a seed makes again
TASK = {"task_type": "CAUSAL_LM"}
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], **TASK}
KINDS = {
    "lora": LORA,
    "lora_default_targets": {"peft_type": "LORA", "r": 4, **TASK},
    "dora": {**LORA, "use_dora": True},
    "pissa": {**LORA, "init_lora_weights": "pissa"},
    "modules_to_save": {**LORA, "modules_to_save": ["embed_tokens"]},
    "trainable_tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2], **TASK},
    "shira": {"peft_type": "SHIRA", "r": 2, "random_seed": 3, "target_modules": ["q_proj"], **TASK},
    "lora_all_linear": {**LORA, "target_modules": "all-linear"},
    "lora_embedding": {**LORA, "target_modules": ["embed_tokens"]},
    "ia3": {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        **TASK,
    },
    "loha": {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj"], **TASK},
    "lokr": {"peft_type": "LOKR", "r": 4, "target_modules": ["q_proj"], **TASK},
    "vera": {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj"], **TASK},
    "prompt_tuning": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, **TASK},
    "prefix_tuning": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, **TASK},
}
UNSAVED = {"vera": {"save_projection": False}}


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_values_are_those_of_peft_on_a_loaded_base(tmp_path: Path, kind: str):
    base = save_tiny_llama(tmp_path, tied=False)
    tensors, _ = initial_adapter(tmp_path, "base", KINDS[kind], seed=7)
    torch.manual_seed(7)
    model = get_peft_model(base, get_peft_config({**KINDS[kind], **UNSAVED.get(kind, {})}))
    stock = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert tensors.keys() == stock.keys()
    assert all(torch.equal(tensors[name], value) for name, value in stock.items())
    assert all(value.is_contiguous() and not value.requires_grad for value in tensors.values())


def test_the_seed_decides_and_the_callers_generator_is_left_alone(tmp_path: Path):
    save_tiny_llama(tmp_path)
    torch.manual_seed(3)
    undisturbed = torch.rand(1)
    torch.manual_seed(3)
    first, config = initial_adapter(tmp_path, "base", LORA, seed=0)
    assert torch.equal(torch.rand(1), undisturbed)
    again, same_config = initial_adapter(tmp_path, "base", LORA, seed=0)
    other, _ = initial_adapter(tmp_path, "base", LORA, seed=1)
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert config == same_config
    assert json.loads(config)["base_model_name_or_path"] == "base"


def test_the_base_weights_are_not_read(tmp_path: Path):
    save_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert initial_adapter(tmp_path, "base", LORA, seed=0)


def test_a_base_that_is_needed_and_not_there_is_named(tmp_path: Path):
    save_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="starts from values of the base model, which can't be read"):
        initial_adapter(tmp_path, "base", {**LORA, "use_dora": True}, seed=0)


def test_values_that_peft_does_not_use_as_they_are_loaded_are_refused(tmp_path: Path):
    save_tiny_llama(tmp_path)
    config = {"peft_type": "P_TUNING", "num_virtual_tokens": 5, "encoder_hidden_size": 16}
    with pytest.raises(
        CheckpointError, match="prompt_embeddings: for this kind of adapter PEFT does not use"
    ):
        initial_adapter(tmp_path, "base", config, seed=0)


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LORA", "target_modules": ["no_such"]},
        {"peft_type": "NO_SUCH"},
        {**LORA, "no_such_setting": 1},
        {"r": 4},
    ],
)
def test_settings_that_fit_nothing_are_refused(tmp_path: Path, config: dict[str, object]):
    save_tiny_llama(tmp_path)
    with pytest.raises(CheckpointError, match="peft_config: expected settings of PEFT"):
        initial_adapter(tmp_path, "base", config, seed=0)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt_tuning"])
def test_stock_peft_opens_a_saved_adapter(tmp_path: Path, kind: str):
    model = save_tiny_llama(tmp_path / "base")
    tensors, config = initial_adapter(tmp_path / "base", str(tmp_path / "base"), KINDS[kind], seed=0)
    changed = {name: value + 0.25 for name, value in tensors.items()}
    save_model_folder(tmp_path / "last", changed, {"adapter_config.json": config.encode()}, {"round": 0})
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, tmp_path / "last"))
    assert all(torch.equal(loaded[name], value) for name, value in changed.items())


def test_stock_peft_opens_it_in_a_separate_process_and_generates(tmp_path: Path):
    save_tiny_llama(tmp_path / "base")
    tensors, config = initial_adapter(tmp_path / "base", str(tmp_path / "base"), LORA, seed=0)
    save_model_folder(tmp_path / "last", tensors, {"adapter_config.json": config.encode()}, {"round": 0})
    code = (
        "import sys, torch; from peft import AutoPeftModelForCausalLM as M\n"
        "model = M.from_pretrained(sys.argv[1])\n"
        "print(model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "last")], capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stderr
    assert 3 <= int(out.stdout.split()[-1]) <= 5
    assert set(load_file(tmp_path / "last/adapter_model.safetensors")) == set(tensors)
