"""The training that all runs of round_overhead.py do: one model, one file of rows, the same settings."""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def sft_settings(batch_size: int, num_tokens: int) -> dict[str, Any]:
    """What SFTConfig gets in every run."""
    return {
        "per_device_train_batch_size": batch_size,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "linear",
        "max_length": num_tokens,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
    }


def build_trainer(settings_file: Path, output_dir: Path, **more: Any) -> SFTTrainer:
    """A plain trainer from the benchmark's settings file."""
    settings = json.loads(settings_file.read_text())
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype="float32"),
        args=SFTConfig(
            output_dir=str(output_dir),
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings["sft"],
            **more,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )


def arguments() -> tuple[Path, Path, int]:
    """Settings file, output folder and number of steps from the command line."""
    settings_file, output_dir, num_steps = sys.argv[1:]
    return Path(settings_file), Path(output_dir), int(num_steps)
