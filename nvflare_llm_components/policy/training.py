"""What a job may set of the training. Everything else is refused, also what later releases may bring."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from nvflare_llm_components.policy.schema import (
    Fraction,
    Name,
    Names,
    PolicyError,
    count,
    number,
    refuse_unlisted,
)

_Dtype = Literal["float32", "bfloat16", "float16"]
_Revision = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.\-/]{0,127}$")]
_Token = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
_Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_32bit",
    "lion_8bit",
]
_ScheduleSetting = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)] | Name

SFT_CONFIG: dict[str, Any] = {
    # steps
    "learning_rate": number(0, 10),
    "lr_scheduler_type": _Schedule,
    "lr_scheduler_kwargs": Annotated[dict[Name, _ScheduleSetting], Field(max_length=16)],
    "warmup_steps": number(0, 1e7),
    "optim": _Optimizer,
    "weight_decay": Fraction,
    "adam_beta1": Fraction,
    "adam_beta2": Fraction,
    "adam_epsilon": Fraction,
    "max_grad_norm": number(0, 1e6),
    "label_smoothing_factor": Fraction,
    "neftune_noise_alpha": number(0, 1000),
    "router_aux_loss_coef": number(0, 10),
    "loss_type": Literal["nll", "dft", "chunked_nll"],
    "seed": count(0, 2**32 - 1),
    "data_seed": count(0, 2**32 - 1),
    "full_determinism": bool,
    # batches
    "per_device_train_batch_size": count(1, 4096),
    "per_device_eval_batch_size": count(1, 4096),
    "gradient_accumulation_steps": count(1, 65536),
    "eval_accumulation_steps": count(1, 65536),
    "average_tokens_across_devices": bool,
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
    "dataloader_drop_last": bool,
    "dataloader_num_workers": count(0, 16),
    "dataloader_pin_memory": bool,
    "dataloader_persistent_workers": bool,
    "dataloader_prefetch_factor": count(1, 64),
    # rows
    "max_length": count(1, 2**20),
    "truncation_mode": Literal["keep_start", "keep_end"],
    "packing": bool,
    "packing_strategy": Literal["bfd", "bfd_split", "wrapped"],
    "padding_free": bool,
    "pad_to_multiple_of": count(1, 4096),
    "eval_packing": bool,
    "completion_only_loss": bool,
    "assistant_only_loss": bool,
    "shuffle_dataset": bool,
    "dataset_num_proc": count(1, 16),
    "pad_token": _Token,
    # memory and speed
    "bf16": bool,
    "fp16": bool,
    "bf16_full_eval": bool,
    "fp16_full_eval": bool,
    "tf32": bool,
    "use_cpu": bool,
    "gradient_checkpointing": bool,
    "gradient_checkpointing_kwargs": Annotated[dict[Literal["use_reentrant"], bool], Field(max_length=1)],
    "activation_offloading": bool,
    "use_liger_kernel": bool,
    "torch_empty_cache_steps": count(1, 10**6),
    # records
    "logging_strategy": Literal["steps", "epoch"],
    "logging_steps": number(0, 1e6),
    "logging_first_step": bool,
    "logging_nan_inf_filter": bool,
    "prediction_loss_only": bool,
}

_REASONS = {
    "output_dir": "the run directory of the job is used",
    "num_train_epochs": "set local_epochs on the executor",
    "max_steps": "set local_steps on the executor",
    "resume_from_checkpoint": "training state survives by itself, see checkpoint on the executor",
    "save_strategy": "training state survives by itself, see checkpoint on the executor",
    "eval_strategy": "give eval_data: each round's global model is evaluated",
    "trust_remote_code": "a job may not bring code",
    "torch_compile": "it starts compilers on the site",
    "model_init_kwargs": "set model_kwargs on the executor",
    "chat_template_path": "the template comes with the model's tokenizer, and is saved with the global model",
    "eos_token": "set it in tokenizer_config.json of the model's folder: it is saved with the global model",
    "dataset_text_field": "a row of plain text has it in the column 'text'",
    "push_to_hub": "a site's model leaves it by the federation only",
    "report_to": "curves go to TensorBoard and to the server",
    "load_best_model_at_end": "the server keeps the best global model",
    "auto_find_batch_size": "it would restart the training inside a round",
    "deepspeed": "it is set by the executor, not by sft_config",
    "fsdp": "it is set by the executor, not by sft_config",
}

QUANTIZATION: dict[str, Any] = {
    "quant_method": Literal["bitsandbytes"],
    "load_in_4bit": bool,
    "load_in_8bit": bool,
    "bnb_4bit_compute_dtype": _Dtype,
    "bnb_4bit_quant_type": Literal["nf4", "fp4"],
    "bnb_4bit_use_double_quant": bool,
    "bnb_4bit_quant_storage": Literal["uint8", "float32", "bfloat16", "float16"],
    "llm_int8_threshold": number(0, 1000),
    "llm_int8_skip_modules": Names,
}

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""What transformers has built in; any other name is a kernel on the hub, downloaded and run."""

MODEL_KWARGS: dict[str, Any] = {
    "dtype": _Dtype | Literal["auto"],
    "attn_implementation": Literal[ATTENTION],
    "revision": _Revision,
    "quantization_config": dict[Name, Any],  # checked by QUANTIZATION
    "attention_dropout": Fraction,
}

_MODEL_REASONS = {
    "trust_remote_code": "a job may not bring code",
    "allow_all_kernels": "a job may not bring code",
    "use_safetensors": "only safetensors are read",
    "state_dict": "weights come from the federation",
    "key_mapping": "names are those of the checkpoint",
    "torch_dtype": "it is called dtype",
    "num_hidden_layers": "the model's shape is that of its config.json",
}

BUDGET: dict[str, Any] = {
    "local_epochs": number(1e-6, 1000),
    "local_steps": count(1, 10**6),
    "num_processes": count(1, 64) | Literal["auto"],
    "sharding": Literal["none", "full"],
    "offload": Literal["none", "cpu"],
}


def check_training(
    *, sft_config: Mapping[str, Any] | None, model_kwargs: Mapping[str, Any] | None, **budget: Any
) -> None:
    """Check what a job sets of model and training.

    Args:
        sft_config: for ``trl.SFTConfig``.
        model_kwargs: for ``from_pretrained``.
        budget: the executor's arguments named in ``BUDGET``.

    Raises:
        PolicyError: naming each setting that is not allowed or out of its range.
    """
    refuse_unlisted("sft_config", sft_config or {}, SFT_CONFIG, _REASONS)
    refuse_unlisted("model_kwargs", model_kwargs or {}, MODEL_KWARGS, _MODEL_REASONS)
    refuse_unlisted(
        "model_kwargs.quantization_config",
        (model_kwargs or {}).get("quantization_config") or {},
        QUANTIZATION,
    )
    refuse_unlisted("executor", budget, BUDGET)


def check_fedprox_mu(mu: object) -> float:
    """FedProx's coefficient as the server sent it; 0 where it sent none.

    Raises:
        PolicyError: it is no finite number from 0 on.
    """
    if mu is None:
        return 0.0
    refuse_unlisted("task", {"fedprox_mu": mu}, {"fedprox_mu": number(0, 1e6)})
    if not isinstance(mu, int | float):
        raise PolicyError("task.fedprox_mu: expected a number.")
    return float(mu)
