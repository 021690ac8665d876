"""What a job may set of the training: every key exists, and what is dangerous or absurd is refused."""

import dataclasses
import math
import time

import pytest
from trl import SFTConfig

from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.training import MODEL_KWARGS, SFT_CONFIG, check_fedprox_mu, check_training


def check(sft: dict | None = None, model: dict | None = None, **budget: object) -> None:
    check_training(sft_config=sft, model_kwargs=model, **budget)


def test_every_allowed_setting_is_one_of_trls():
    assert SFT_CONFIG.keys() <= {field.name for field in dataclasses.fields(SFTConfig)}


def test_what_the_shipped_jobs_set_is_allowed():
    check(
        {
            "learning_rate": 5e-4,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "max_length": 512,
            "logging_steps": 1,
            "seed": 0,
        },
        {"dtype": "bfloat16", "attn_implementation": "sdpa", "revision": "refs/pr/3"},
        local_epochs=1,
        local_steps=None,
    )


def test_none_stands_for_the_default():
    check({"neftune_noise_alpha": None, "pad_to_multiple_of": None}, {"dtype": None})


HOSTILE_SFT = {
    "trust_remote_code": True,
    "output_dir": "/etc",
    "push_to_hub": True,
    "hub_token": "x",
    "report_to": "wandb",
    "save_strategy": "steps",
    "deepspeed": "/etc/passwd",
    "fsdp": "full_shard",
    "chat_template_path": "/etc/passwd",
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "accelerator_config": "/etc/passwd",
    "liger_kernel_config": {},
    "torch_compile": True,
    "optim": "galore_adamw",
    "optim_target_modules": ["(a+)+$"],
    "dataloader_num_workers": 200,
    "dataset_num_proc": 200,
    "pad_to_multiple_of": 10**9,
    "max_length": 10**9,
    "per_device_train_batch_size": 10**9,
    "gradient_accumulation_steps": 0,
    "weight_decay": math.nan,
    "max_grad_norm": math.nan,
    "learning_rate": math.inf,
    "seed": -1,
    "lr_scheduler_kwargs": {"a": {"b": 1}},
    "gradient_checkpointing_kwargs": {"context_fn": "os.system"},
    "eos_token": "</s>",
    "dataset_text_field": "body",
    "logging_steps": -1,
}


@pytest.mark.parametrize("key", HOSTILE_SFT)
def test_a_hostile_sft_config_is_refused_by_name(key):
    with pytest.raises(PolicyError, match=rf"sft_config\.{key}"):
        check({"learning_rate": 1e-3, key: HOSTILE_SFT[key]})


HOSTILE_MODEL = {
    "trust_remote_code": True,
    "allow_all_kernels": True,
    "attn_implementation": "org/kernel",
    "key_mapping": {"(a+)+$": "b"},
    "num_hidden_layers": 10**6,
    "vocab_size": 10**9,
    "state_dict": {},
    "use_safetensors": False,
    "gguf_file": "x.gguf",
    "config": {"auto_map": {"AutoModel": "evil.py"}},
    "cache_dir": "/etc",
    "token": "secret",
    "device_map": {"": "disk"},
    "offload_folder": "/etc",
    "revision": "../../etc",
    "dtype": "torch.float32; import os",
    "subfolder": "../..",
    "proxies": {"https": "http://evil"},
    "distributed_config": {"fsdp_size": 2},
}


@pytest.mark.parametrize("key", HOSTILE_MODEL)
def test_hostile_model_kwargs_are_refused_by_name(key):
    with pytest.raises(PolicyError, match=rf"model_kwargs\.{key}"):
        check(model={key: HOSTILE_MODEL[key]})


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": "yes"},
        {"quant_method": "bitsandbytes", "modules_to_not_convert": ["x"]},
        {"llm_int8_skip_modules": ["(a+)+$"]},
    ],
)
def test_a_hostile_quantization_config_is_refused(config):
    with pytest.raises(PolicyError, match=r"model_kwargs\.quantization_config\."):
        check(model={"quantization_config": config})


def test_a_checked_4_bit_base_is_allowed():
    check(
        model={
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": "bfloat16",
            }
        }
    )


@pytest.mark.parametrize(
    "budget", [{"local_steps": 0}, {"local_steps": 10**9}, {"local_epochs": math.inf}, {"local_epochs": True}]
)
def test_an_absurd_budget_is_refused(budget):
    with pytest.raises(PolicyError, match=r"executor\.local_"):
        check(**budget)


def test_a_number_from_the_environment_is_explained():
    with pytest.raises(PolicyError, match="A value from the environment is text to FLARE"):
        check({"learning_rate": "0.001"})


def test_a_typing_mistake_is_answered_with_the_right_name():
    with pytest.raises(PolicyError, match="Did you mean 'learning_rate'"):
        check({"learning_rat": 0.1})


def test_what_is_found_is_escaped_and_cut():
    with pytest.raises(PolicyError) as caught:
        check({"optim": "x\nERROR forged" + "y" * 10_000, "a\nb" * 100: 1})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("mu", [math.nan, math.inf, -1, 1e30, "0.1", [1], True])
def test_a_coefficient_that_cannot_be_is_refused(mu):
    with pytest.raises(PolicyError, match="fedprox_mu"):
        check_fedprox_mu(mu)


def test_a_coefficient_is_passed_on():
    assert check_fedprox_mu(None) == 0.0
    assert check_fedprox_mu(0.01) == 0.01


def test_the_allowed_model_settings_are_few():
    assert len(MODEL_KWARGS) < 10


def test_thousands_of_unknown_settings_are_refused_at_once():
    """To look for what each might mean took half a minute."""
    started = time.process_time()
    with pytest.raises(PolicyError, match="lerning_rate_0: it is not among") as told:
        check({f"lerning_rate_{n}": 1 for n in range(100_000)})
    assert time.process_time() - started < 5
    assert str(told.value).count("it is not among") == 5
