"""What a job may set of an adapter: PEFT's own kinds and keys, without paths, code and patterns."""

import dataclasses

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from nvflare_llm_components.policy.adapters import KINDS, PEFT_CONFIG, check_peft_config
from nvflare_llm_components.policy.schema import PolicyError


def test_every_allowed_kind_is_one_of_pefts_and_one_is_left_out():
    assert {kind.value for kind in PeftType} - set(KINDS) == {"XLORA"}


def test_every_allowed_setting_is_one_of_pefts():
    fields = {
        field.name for config in PEFT_TYPE_TO_CONFIG_MAPPING.values() for field in dataclasses.fields(config)
    }
    assert PEFT_CONFIG.keys() <= fields


def test_what_a_job_usually_sets_is_allowed():
    check_peft_config(None)
    check_peft_config(
        {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 4},
            "layers_to_transform": [0, 1],
            "init_lora_weights": "pissa_niter_16",
            "task_type": "CAUSAL_LM",
        }
    )
    check_peft_config({"peft_type": "LORA", "target_modules": "all-linear"})


HOSTILE = {
    "peft_type": "XLORA",
    "r": 10**6,
    "lora_dropout": float("nan"),
    "target_modules": "(a+)+$",
    "modules_to_save": ["(a|a)*b"],
    "rank_pattern": {"(a+)+$": 4},
    "megatron_core": "os",
    "megatron_config": {},
    "auto_mapping": {"base_model_class": "x"},
    "base_model_name_or_path": "/etc",
    "tokenizer_name_or_path": "/etc",
    "tokenizer_kwargs": {"trust_remote_code": True},
    "prompt_tuning_init_state_dict_path": "/etc/passwd",
    "adapters": {"a": "/etc"},
    "shadow_model": "/etc",
    "revision": "main",
    "runtime_config": {},
    "num_virtual_tokens": 10**12,
    "num_vectors": 2**20,
    "psoft_svd_lowrank_niter": 10**6,
    "init_lora_weights": "pissa_niter_999999999",
    "loftq_config": {"loftq_iter": 10**6},
    "eva_config": {"a": {"path": "os.system"}},
    "corda_config": {"cache_file": "secret.pt"},
    "task_type": "SEQ_CLS",
    "token_indices": list(range(10**5 + 1)),
}


@pytest.mark.parametrize("key", HOSTILE)
def test_a_hostile_peft_config_is_refused_by_name(key):
    with pytest.raises(PolicyError, match=rf"peft_config\.{key}"):
        check_peft_config({"peft_type": "LORA", key: HOSTILE[key]})


def test_a_missing_kind_is_named():
    with pytest.raises(PolicyError, match=r"peft_config\.peft_type: expected 'ADALORA'"):
        check_peft_config({"r": 8})


def test_settings_that_are_no_object_are_refused():
    with pytest.raises(PolicyError, match="peft_config: expected an object, found list"):
        check_peft_config(["LORA"])  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_names_are_no_more_than_python_keeps_compiled(key):
    """A thousand took eight seconds on a model of fourteen modules."""
    check_peft_config({"peft_type": "LORA", key: {f"layers.{n}.q_proj": 2 for n in range(240)}})
    with pytest.raises(PolicyError, match=f"peft_config.{key}: expected"):
        check_peft_config({"peft_type": "LORA", key: {f"layers.{n}.q_proj": 2 for n in range(241)}})


def test_few_patterns_of_layers_are_allowed():
    with pytest.raises(PolicyError, match=r"peft_config\.layers_pattern"):
        check_peft_config({"peft_type": "LORA", "layers_pattern": [f"a{n}" for n in range(17)]})


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "P_TUNING", "encoder_hidden_size": 2**14},
        {"peft_type": "P_TUNING", "encoder_num_layers": 256},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2**14},
        {"peft_type": "CARTRIDGE", "num_virtual_tokens": 2**12, "num_layers": 256},
        {"peft_type": "VBLORA", "num_vectors": 2**14, "vector_length": 2**14},
    ],
    ids=str,
)
def test_a_few_words_make_no_adapter_of_gigabytes(settings):
    """The first two took more than 5 GiB on a model of forty thousand weights, the others 1.4 to 2.4."""
    with pytest.raises(PolicyError, match=r"peft_config.*expected"):
        check_peft_config(settings)
