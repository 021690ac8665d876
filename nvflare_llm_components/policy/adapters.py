"""What a job may set of an adapter: the kinds of PEFT, and their settings with ranges.

Paths, other models, code, tokenizers and free patterns are not among them: PEFT would open the first, import
the second and hang on the last.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, StringConstraints

from nvflare_llm_components.policy.schema import Fraction, Name, Names, PolicyError, count, refuse_unlisted

MAX_RANK = 4096

_Rank = count(0, MAX_RANK)
_Size = count(-1, 2**14)  # two of them make a tensor of 1 GiB at most
_Length = count(0, 2**24)  # of one vector
_Steps = count(0, 2**31)
_Few = count(0, 256)  # of what is repeated: layers, iterations
_Part = count(-1, 2**12)  # of what is multiplied by a width of the model, or by another one of its kind
_MOST_PREFIXES = 2**18  # of all layers
_Seed = count(0, 2**63 - 1)
_Factor: TypeAlias = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
# PEFT matches each name with each module, as a regular expression: Python keeps 512 of them compiled.
_Numbers = Annotated[
    dict[Name, Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]], Field(max_length=240)
]
_Indices = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=10**5)]
_Loftq: Any = Annotated[
    dict[Literal["loftq_bits", "loftq_iter"], Annotated[int, Field(ge=1, le=64)]], Field(max_length=2)
]
_Eva: Any = Annotated[
    dict[
        Literal["rho", "tau", "use_label_mask", "label_mask_value", "whiten", "adjust_scaling_factors"],
        bool | _Factor,
    ],
    Field(max_length=6),
]
_Corda: Any = Annotated[dict[Literal["corda_method"], Literal["ipm", "kpm"]], Field(max_length=1)]
_Init = bool | Name
_LoraInit = (
    bool
    | Literal["gaussian", "eva", "olora", "pissa", "corda", "lora_ga", "loftq", "orthogonal", "mica"]
    | Annotated[str, StringConstraints(pattern=r"^pissa_niter_[0-9]{1,2}$")]
)

_BY_TYPE: dict[Any, str] = {
    _Rank: "r init_r target_r mini_r hybrid_r subspace_rank num_ranks",
    _Size: "alpha lora_alpha randlora_alpha psoft_alpha adapter_layers adapter_len block_size "
    "boft_block_num boft_block_size boft_n_butterfly_factor decompose_factor "
    "gralora_k group_size asa_target_subspaces n_skills n_splits n_tasks "
    "num_B num_attention_heads num_frozen_tokens num_subspaces num_tasks "
    "oft_block_size prompt_tuning_init_task qalora_group_size stride_A "
    "token_dim topk u shadow_hidden_size shadow_intermediate_size "
    "shadow_num_attention_heads update_hidden_size delora_lambda effective_rank",
    _Part: "num_vectors num_virtual_tokens vector_length",
    count(0, 1024): "encoder_hidden_size",
    count(0, 4): "encoder_num_layers",
    _Few: "num_layers depth num_transformer_submodules psoft_svd_lowrank_niter "
    "num_cayley_neumann_terms shadow_num_hidden_layers",
    _Steps: "deltaT final_warmup init_warmup mask_interval tfinal tinit total_step",
    _Length: "n_frequency theta_d_length",
    _Seed: "projection_prng_key projection_seed proj_seed random_loc_seed random_seed generator_seed",
    Fraction: "asa_importance_beta asa_uncertainty_beta beta1 beta2 boft_dropout deft_dropout "
    "encoder_dropout frod_dropout gralora_dropout hira_dropout lora_dropout miss_dropout module_dropout "
    "psoft_dropout pvera_dropout randlora_dropout rank_dropout shadow_dropout tinylora_dropout "
    "unilora_dropout vblora_dropout vera_dropout sparse_rate sparsity svd_threshold weight_tying d_initial",
    _Factor: "asa_schedule_exponent auxiliary_loss_weight cayley_neumann_eps eps init_logits_std init_scale "
    "init_theta_d_bound init_v_bound init_vector_bank_bound opt_loss_decay_factor "
    "opt_projection_epsilon opt_projection_format_epsilon orth_reg_weight regularization_alpha scaling "
    "shadow_alpha",
    bool: "apply_GS block_share coft decompose_both ensure_weight_tying fan_in_fan_out init_ia3_weights "
    "inference_mode lora_bias para prefix_projection proportional_parameters psoft_mag_a psoft_mag_b "
    "psoft_orth rank_dropout_scale runtime_offload_base_weight sample_at_inference save_indices "
    "save_only_topk_weights save_precomputed_indices save_projection select_top share_embeddings sparse "
    "use_asa use_cayley_neumann use_dora use_dynamic_rank use_effective_conv2d use_idwt use_qalora "
    "use_rslora very_sparse progressbar",
    Name: "ab_svd_init act_fn bias config_A_B config_C config_D_E decomposition_method "
    "encoder_reparameterization_type mask_type opt_weighted_loss_type poly_type psoft_svd variant "
    "wavelet_family",
    _Init: "init_weights",
    _LoraInit: "init_lora_weights",
    Name | Names: "exclude_modules feedforward_modules modules_to_save target_modules",
    Name | Annotated[list[Name], Field(max_length=16)]: "layers_pattern",
    Names: "target_parameters",
    _Numbers: "alpha_pattern block_size_pattern lambda_pattern n_frequency_pattern rank_pattern",
    _Indices: "alora_invocation_tokens cpt_mask cpt_token_ids cpt_tokens_type_mask token_indices",
    count(0, 10**4) | _Indices: "layers_to_transform",
    _Indices | dict[Name, _Indices]: "trainable_token_indices",
    _Loftq: "loftq_config",
    _Eva: "eva_config",
    _Corda: "corda_config",
    Literal["CAUSAL_LM"]: "task_type",
}

_KINDS = (
    "ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA "
    "HIRA HRA IA3 LILY LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY "
    "PREFIX_TUNING PROMPT_TUNING PSOFT PVERA P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA "
    "TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT"
)
KINDS = tuple(_KINDS.split())
"""Every ``peft_type`` but XLORA, which loads further adapters from paths."""

PEFT_CONFIG: dict[str, Any] = {
    "peft_type": Literal[KINDS],
    **{key: kind for kind, keys in _BY_TYPE.items() for key in keys.split()},
}

_REASONS = {
    "base_model_name_or_path": "it is model_name_or_path",
    "auto_mapping": "a job may not bring code",
    "megatron_core": "a job may not import modules",
    "megatron_config": "a job may not import modules",
    "tokenizer_name_or_path": "the tokenizer is the model's",
    "tokenizer_kwargs": "the tokenizer is the model's",
    "prompt_tuning_init_text": "it needs a tokenizer of its own; the values come from the server",
    "prompt_tuning_init": "the values come from the server",
    "prompt_tuning_init_state_dict_path": "a job may not name files",
    "adapters": "a job may not name files",
    "shadow_model": "a job may not name files",
    "revision": "set it in model_kwargs",
}


def check_peft_config(peft_config: Mapping[str, Any] | None) -> None:
    """Check what a job sets of an adapter; None trains all weights.

    Raises:
        PolicyError: naming each setting that is not allowed or out of its range.
    """
    if peft_config is None:
        return
    if not isinstance(peft_config, Mapping):
        raise PolicyError(f"peft_config: expected an object, found {type(peft_config).__name__}.")
    refuse_unlisted("peft_config", {"peft_type": "", **peft_config}, PEFT_CONFIG, _REASONS)
    num_prefixes = (peft_config.get("num_virtual_tokens") or 0) * (peft_config.get("num_layers") or 1)
    if num_prefixes > _MOST_PREFIXES:
        raise PolicyError(
            f"peft_config: num_virtual_tokens x num_layers: expected at most {_MOST_PREFIXES:,}, found "
            f"{num_prefixes:,}. Leave num_layers out: PEFT knows the model's."
        )
