"""Puts model, tokenizer, data and settings together into one trainer."""

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback
from transformers.core_model_loading import WeightConverter

from nvflare_llm_components.tensors.adapters import adapter_config, sft_settings
from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.hub import check_attention, only_for
from nvflare_llm_components.tensors.names import conversions_of
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.training.budget import EpochRows, batches_per_epoch, steps_per_epoch
from nvflare_llm_components.training.model import freeze_all_but, load_model, load_tokenizer
from nvflare_llm_components.training.quantized import check_base, settle_base
from nvflare_llm_components.training.rows import load_rows
from nvflare_llm_components.training.settings import TrainingSettings, build_sft_config
from nvflare_llm_components.training.trainer import RoundTrainer


def build_trainer(settings: TrainingSettings, output_dir: Path) -> RoundTrainer:
    """A trainer that is ready for its first round. What is cheap to check fails before the model is loaded.

    Raises:
        FileNotFoundError: A data file is missing.
        ValueError: A setting, the data or the model cannot be used; the message says which and why.
    """
    train_rows = load_rows(settings.train_data, "train_data", settings.row_limits)
    eval_rows = _load_eval(settings)
    peft_config = adapter_config(settings.peft_config) if settings.peft_config else None
    config = build_sft_config(_sft_settings(settings, peft_config), output_dir)
    check_attention(settings.model_kwargs)
    check_base(settings)
    with only_for(settings.model_name_or_path):
        trainer = _built(settings, config, peft_config, train_rows, eval_rows)
    _check_rows_left(trainer)
    _check_batches(trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _built(
    settings: TrainingSettings, config: Any, peft_config: Any, train_rows: Any, eval_rows: Any
) -> RoundTrainer:
    tokenizer = load_tokenizer(settings.model_name_or_path)
    _check_chat_template(train_rows, tokenizer, config)
    model = load_model(settings.model_name_or_path, settings.model_kwargs | _sharding(settings))
    settle_base(model, settings)
    _check_shardable(model, settings)
    if settings.trainable is not None:
        freeze_all_but(model, settings.trainable)
    try:
        return RoundTrainer(
            model=model,
            args=config,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise _explained(error, model, is_adapter=peft_config is not None) from error


def _sharding(settings: TrainingSettings) -> dict[str, Any]:
    """How transformers shards a model while it loads it: each process reads its part."""
    if not settings.is_sharded:
        return {}
    offload = {"fsdp_cpu_offload": True} if settings.is_offloaded else {}
    return {"distributed_config": {"fsdp_size": settings.num_processes, **offload}}


def _check_shardable(model: Any, settings: TrainingSettings) -> None:
    if settings.is_sharded and any(isinstance(step, WeightConverter) for step in conversions_of(model)):
        raise ReportableError(
            f"sharding: expected 'none' for {model.config.model_type}, which stores its weights otherwise "
            "than its checkpoint (as stacked experts, say), found 'full'. Change the job."
        )


def _sft_settings(settings: TrainingSettings, peft_config: Any) -> dict[str, Any]:
    needed = sft_settings(peft_config) if peft_config else {}
    for key, value in needed.items():
        if settings.sft_config.get(key, value) != value:
            raise ReportableError(
                f"sft_config.{key}: expected {value} with peft_type {peft_config.peft_type.value}, found "
                f"{settings.sft_config[key]}. Leave it out, or choose another kind of adapter."
            )
    return {**settings.sft_config, **needed}


def steps_per_epoch_of(trainer: RoundTrainer) -> int:
    """Optimizer steps in one pass over the rows (after packing, if any)."""
    args = trainer.args
    num_batches = _num_batches(trainer, trainer.train_dataset, args.per_device_train_batch_size)
    return steps_per_epoch(num_batches, args.gradient_accumulation_steps)


def epoch_rows_of(trainer: RoundTrainer) -> EpochRows | None:
    """How many rows each step trains; None where a packed row holds several of them."""
    args = trainer.args
    if args.packing:
        return None
    rows_per_batch = args.per_device_train_batch_size * args.world_size
    num_rows = len(trainer.train_dataset)
    return EpochRows(
        num_rows=num_rows - num_rows % rows_per_batch if args.dataloader_drop_last else num_rows,
        rows_per_step=rows_per_batch * args.gradient_accumulation_steps,
        steps_per_epoch=steps_per_epoch_of(trainer),
    )


def _num_batches(trainer: RoundTrainer, rows: Any, size: int) -> int:
    args = trainer.args
    return batches_per_epoch(len(rows), size, args.dataloader_drop_last, args.world_size)


def _load_eval(settings: TrainingSettings) -> Any:
    if settings.eval_data is None:
        return None
    return load_rows(settings.eval_data, "eval_data", replace(settings.row_limits, min_rows=1))


def _raised_in(package: str, error: BaseException) -> bool:
    return package in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts


def _check_chat_template(rows: Any, tokenizer: Any, config: Any) -> None:
    is_chat = isinstance(rows[0].get("prompt"), list)
    if is_chat and tokenizer.chat_template is None and config.chat_template_path is None:
        raise ReportableError(
            "train_data: expected a tokenizer with a chat template for rows with messages, found none. "
            "Use a chat model, or prepare rows of input and output."
        )


def _check_rows_left(trainer: RoundTrainer) -> None:
    """TRL drops rows whose prompt alone fills ``max_length``."""
    for argument, rows in (("train_data", trainer.train_dataset), ("eval_data", trainer.eval_dataset)):
        if rows is not None and len(rows) == 0:
            raise ReportableError(
                f"{argument}: expected answers within max_length={trainer.args.max_length} tokens, found "
                "that every prompt alone is longer. Set a larger max_length in sft_config."
            )


def _check_batches(trainer: RoundTrainer) -> None:
    """A data loader of length 0 is one of unknown length to transformers' trainer, which waits for ever."""
    args = trainer.args
    for argument, rows, size in (
        ("train_data", trainer.train_dataset, args.per_device_train_batch_size),
        ("eval_data", trainer.eval_dataset, args.per_device_eval_batch_size),
    ):
        if rows is not None and _num_batches(trainer, rows, size) == 0:
            raise ReportableError(
                f"{argument}: expected {size * args.world_size} rows, a whole batch, as dataloader_drop_last "
                f"drops the rest, found {len(rows)}{' after packing' if args.packing else ''}. Set a smaller "
                "batch size in sft_config, or dataloader_drop_last to false."
            )


def _explained(error: Exception, model: Any, is_adapter: bool) -> ValueError:
    # PEFT sees the model alone; what others say may quote a row.
    if not (is_adapter and _raised_in("peft", error)):
        return ValueError(f"sft_config: the trainer cannot be built: {error}")
    modules = sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if "." in name} - {""})
    known = ", ".join(name for name in modules if not name.isdigit())
    return ReportableError(
        f"peft_config: it fits no module of the model: {printable(error)} The model's modules are {known}."
    )
