"""Kinds and variants of adapters, each with small settings for a tiny Llama."""

from typing import Any

_QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
_LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **_QV}
_VIRTUAL = {"num_virtual_tokens": 4}


def _lora(**changes: Any) -> dict[str, Any]:
    return {**_LORA, **changes}


def _kind(peft_type: str, **settings: Any) -> dict[str, Any]:
    return {"peft_type": peft_type, **settings}


WORKING: dict[str, dict[str, Any]] = {
    "LoRA": _LORA,
    "LoRA, all linear": _lora(target_modules="all-linear"),
    "LoRA, with dropout": _lora(lora_dropout=0.1),
    "LoRA, with biases": _lora(bias="lora_only", lora_bias=True),
    "LoRA, rank-stabilised": _lora(use_rslora=True),
    "LoRA, rank pattern": _lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4}),
    "LoRA, one layer": _lora(layers_to_transform=[1], layers_pattern="layers"),
    "LoRA on embed_tokens": _lora(target_modules=["embed_tokens", "q_proj"]),
    "LoRA, Gaussian": _lora(init_lora_weights="gaussian"),
    "LoRA, orthogonal": _lora(init_lora_weights="orthogonal"),
    "LoRA, not zero at first": _lora(init_lora_weights=False),
    "DoRA": _lora(use_dora=True),
    "PiSSA": _lora(init_lora_weights="pissa"),
    "OLoRA": _lora(init_lora_weights="olora"),
    "MiCA": _lora(init_lora_weights="mica"),
    "LoRA and modules_to_save": _lora(modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA and trainable tokens": _lora(trainable_token_indices={"embed_tokens": [18, 79]}),
    "aLoRA": _lora(alora_invocation_tokens=[79, 71]),
    "Trainable tokens": _kind("TRAINABLE_TOKENS", token_indices=[18, 71, 79]),
    "LN tuning": _kind("LN_TUNING", target_modules=["input_layernorm", "norm"]),
    "IA3": _kind("IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": _kind("LOHA", r=4, **_QV),
    "LoKr": _kind("LOKR", r=4, **_QV),
    "VeRA": _kind("VERA", r=8, target_modules=["q_proj"]),
    "VeRA, projection saved": _kind("VERA", r=8, target_modules=["q_proj"], save_projection=True),
    "PVeRA": _kind("PVERA", r=8, target_modules=["q_proj"]),
    "RandLoRA": _kind("RANDLORA", r=4, target_modules=["q_proj"]),
    "RandLoRA, projection saved": _kind("RANDLORA", r=4, target_modules=["q_proj"], save_projection=True),
    "VB-LoRA": _kind("VBLORA", r=4, num_vectors=16, vector_length=16, topk=2, **_QV),
    "Uni-LoRA": _kind("UNILORA", r=4, theta_d_length=64, **_QV),
    "TinyLoRA": _kind("TINYLORA", r=2, u=8, **_QV),
    "GraLoRA": _kind("GRALORA", r=4, gralora_k=2, **_QV),
    "GLoRA": _kind("GLORA", r=4, **_QV),
    "DeLoRA": _kind("DELORA", r=4, **_QV),
    "HiRA": _kind("HIRA", r=4, **_QV),
    "MiSS": _kind("MISS", r=4, **_QV),
    "Lily": _kind("LILY", r=4, stride_A=1, num_B=2, **_QV),
    "PEANuT": _kind("PEANUT", r=4, **_QV),
    "PSOFT": _kind("PSOFT", r=4, **_QV),
    "OFT": _kind("OFT", oft_block_size=8, **_QV),
    "OFT, constrained": _kind("OFT", oft_block_size=8, coft=True, **_QV),
    "BOFT": _kind("BOFT", boft_block_size=4, **_QV),
    "HRA": _kind("HRA", r=4, **_QV),
    "ROAD": _kind("ROAD", group_size=8, **_QV),
    "C3A": _kind("C3A", block_size=16, target_modules=["q_proj"]),
    "FourierFT": _kind("FOURIERFT", n_frequency=16, **_QV),
    "WaveFT": _kind("WAVEFT", n_frequency=16, **_QV),
    "SHiRA": _kind("SHIRA", r=4, random_seed=1, **_QV),
    "BEFT": _kind("BEFT", target_modules=["v_proj"]),
    "DEFT": _kind("DEFT", r=4, **_QV),
    "FRoD": _kind("FROD", **_QV),
    "OSF": _kind("OSF", effective_rank=4, **_QV),
    "Shadow": _kind("SHADOW", r=4),
    "SuperTuning": _kind("SUPERTUNING", sparsity=0.1, **_QV),
    "Prompt tuning": _kind("PROMPT_TUNING", **_VIRTUAL),
    "Prefix tuning": _kind("PREFIX_TUNING", **_VIRTUAL),
    "Cartridge": _kind("CARTRIDGE", num_virtual_tokens=4, num_frozen_tokens=1),
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "EVA": (_lora(init_lora_weights="eva"), "come from data"),
    "CorDA": (_lora(init_lora_weights="corda"), "come from data"),
    "LoRA-GA": (_lora(init_lora_weights="lora_ga"), "come from data"),
    "PiSSA, fast": (_lora(init_lora_weights="pissa_niter_4"), "random numbers"),
    "LoftQ": (_lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "quantized one"),
    "AdaLoRA": (_kind("ADALORA", init_r=4, total_step=10, **_QV), "prune other ranks"),
    "P-tuning": (_kind("P_TUNING", encoder_hidden_size=16, **_VIRTUAL), "does not use the values"),
    "Prefix tuning, projected": (
        _kind("PREFIX_TUNING", prefix_projection=True, encoder_hidden_size=16, **_VIRTUAL),
        "does not use the values",
    ),
    "Multitask prompt tuning": (_kind("MULTITASK_PROMPT_TUNING", num_tasks=2, **_VIRTUAL), "task ids"),
    "LoRA on lm_head": (_lora(target_modules=["lm_head", "q_proj"]), "needs logits"),
    "Adaption prompt": (_kind("ADAPTION_PROMPT", adapter_len=4, adapter_layers=2), "needs logits"),
    "CPT": (
        _kind("CPT", cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
        "needs logits",
    ),
    "Poly": (_kind("POLY", r=4, **_QV), "task ids"),
}
"""Settings, and words of the reason."""
