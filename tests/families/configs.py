"""Tiny configurations of causal language models, one a family, made in code."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_COMMON: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 12, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_HEAD = {"head_dim": 8}
_GPT2 = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
_MAMBA = {"state_size": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"rotary_dim": 4, **_GPT2},
    "cohere": {},
    "cohere2": {},
    "deepseek_v2": {**_ROUTED_EXPERTS, **_LATENT},
    "deepseek_v3": {**_ROUTED_EXPERTS, **_LATENT},
    "diffllama": {},
    "ernie4_5": _HEAD,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone4": {},
    "falcon": {},
    "falcon_mamba": _MAMBA,
    "flex_olmo": _EXPERTS,
    "gemma": _HEAD,
    "gemma2": _HEAD,
    "gemma3_text": _HEAD,
    "glm": _HEAD,
    "glm4": _HEAD,
    "glm4_moe": _ROUTED_EXPERTS | _HEAD,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": {**_LOCAL_EXPERTS, **_HEAD},
    "gptj": {"rotary_dim": 4, **_GPT2},
    "granite": {},
    "granitemoe": _LOCAL_EXPERTS,
    "granitemoeshared": _LOCAL_EXPERTS,
    "helium": _HEAD,
    "jamba": {"num_experts": 4, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {},
    "llama": {},
    "mamba": _MAMBA,
    "minimax": _LOCAL_EXPERTS | _HEAD,
    "ministral3": {},
    "mistral": {},
    "mixtral": _LOCAL_EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "nanochat": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": _LOCAL_EXPERTS,
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": _HEAD,
    "qwen3_moe": {**_EXPERTS, **_HEAD},
    "qwen3_next": {
        **_EXPERTS,
        **_HEAD,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "seed_oss": _HEAD,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}
"""What a family's configuration says beside or instead of the common settings."""

FAST = (
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma3_text",
    "opt",
    "bloom",
    "phi3",
    "falcon",
    "mixtral",
    "qwen3_moe",
    "granitemoe",
    "deepseek_v3",
    "gpt_oss",
)
"""Those that differ most in names, ties and layouts."""


def tiny_config(family: str) -> PreTrainedConfig:
    """A configuration of 20 to 70 thousand weights, tied or not as the family's default."""
    default = AutoConfig.for_model(family)
    known = {name: value for name, value in _COMMON.items() if getattr(default, name, None) is not None}
    return AutoConfig.for_model(family, **(known | FAMILIES[family]), **_SPECIALS)
