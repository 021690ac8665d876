"""Puts model, tokenizer, data and settings together into one trainer."""

from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from nvflare_llm_components.training.budget import Budget, steps_per_epoch
from nvflare_llm_components.training.model import load_model, load_peft_config, load_tokenizer
from nvflare_llm_components.training.rows import load_rows
from nvflare_llm_components.training.settings import TrainingSettings, build_sft_config
from nvflare_llm_components.training.trainer import RoundTrainer


def build_trainer(settings: TrainingSettings, output_dir: Path) -> RoundTrainer:
    """A trainer that is ready for its first round. What is cheap to check fails before the model is loaded.

    Raises:
        FileNotFoundError: A data file is missing.
        ValueError: A setting, the data or the model cannot be used; the message says which and why.
    """
    train_rows = load_rows(settings.train_data, "train_data")
    eval_rows = load_rows(settings.eval_data, "eval_data") if settings.eval_data else None
    config = build_sft_config(settings.sft_config, output_dir)
    peft_config = load_peft_config(settings.peft_config) if settings.peft_config else None
    tokenizer = load_tokenizer(settings.model_name_or_path)
    _check_chat_template(train_rows, tokenizer, config)
    model = load_model(settings.model_name_or_path, settings.model_kwargs)
    try:
        trainer = RoundTrainer(
            model=model,
            args=config,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    except ValueError as error:
        raise ValueError(_explained(error, model, is_adapter=peft_config is not None)) from error
    _check_rows_left(trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def local_budget(trainer: RoundTrainer, settings: TrainingSettings) -> Budget:
    """The steps of each round, from the settings and the number of rows (after packing, if any)."""
    args = trainer.args
    steps = steps_per_epoch(
        num_rows=len(trainer.train_dataset),
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        drop_last=args.dataloader_drop_last,
    )
    return Budget(
        local_steps=settings.local_steps, local_epochs=settings.local_epochs or 1.0, steps_per_epoch=steps
    )


def _check_chat_template(rows: Any, tokenizer: Any, config: Any) -> None:
    is_chat = isinstance(rows[0].get("prompt"), list)
    if is_chat and tokenizer.chat_template is None and config.chat_template_path is None:
        raise ValueError(
            "train_data: expected a tokenizer with a chat template for rows with messages, found none. "
            "Use a chat model, or prepare rows of input and output."
        )


def _check_rows_left(trainer: RoundTrainer) -> None:
    """TRL drops rows whose prompt alone fills ``max_length``."""
    for argument, rows in (("train_data", trainer.train_dataset), ("eval_data", trainer.eval_dataset)):
        if rows is not None and len(rows) == 0:
            raise ValueError(
                f"{argument}: expected answers within max_length={trainer.args.max_length} tokens, found "
                f"that every "
                "prompt alone is longer. Set a larger max_length in sft_config."
            )


def _explained(error: ValueError, model: Any, is_adapter: bool) -> str:
    if not (is_adapter and "modules" in str(error).lower()):
        return f"sft_config: the trainer cannot be built: {error}"
    modules = sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if "." in name} - {""})
    known = ", ".join(name for name in modules if not name.isdigit())
    return f"peft_config: it fits no module of the model: {error} The model's modules are {known}."
