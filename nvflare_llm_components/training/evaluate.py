"""Loss of a saved model on a file of rows, computed as the executor computes it."""

import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PrinterCallback
from trl import SFTTrainer

from nvflare_llm_components.training.metrics import perplexity
from nvflare_llm_components.training.model import load_model, load_tokenizer
from nvflare_llm_components.training.rows import load_rows
from nvflare_llm_components.training.settings import build_sft_config


def evaluate_model(
    *,
    model_folder: Path,
    eval_data: Path,
    base_model: str | None = None,
    sft_config: dict[str, Any] | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Evaluate a Hugging Face folder, or an adapter's folder on its base.

    Args:
        model_folder: Folder of a model, or of an adapter if ``base_model`` is given.
        eval_data: Rows as the executor reads them.
        base_model: The adapter's base: folder or hub name.
        sft_config: Passed to ``trl.SFTConfig``, such as ``per_device_eval_batch_size``.
        model_kwargs: Passed to ``from_pretrained``.

    Returns:
        ``eval_loss`` and ``eval_perplexity``.

    Raises:
        FileNotFoundError: ``eval_data`` is missing.
        ValueError: The data, the model or a setting cannot be used.
    """
    rows = load_rows(eval_data, "eval_data")
    source = base_model or str(model_folder)
    model: Any = load_model(source, model_kwargs or {})
    if base_model:
        model = PeftModel.from_pretrained(model, model_folder)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = SFTTrainer(
            model=model,
            args=build_sft_config(sft_config or {}, Path(output_dir)),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=load_tokenizer(source),
        )
        trainer.remove_callback(PrinterCallback)
        loss = float(trainer.evaluate()["eval_loss"])
    return {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
