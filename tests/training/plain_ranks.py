"""The reference of several processes: plain ``SFTTrainer`` under torchrun, in one uninterrupted call."""

import json
import sys
from pathlib import Path

from peft import get_peft_config
from safetensors.torch import save_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from nvflare_llm_components.training import weights
from nvflare_llm_components.training.model import load_model, load_tokenizer
from nvflare_llm_components.training.rows import load_rows


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.points: list[list[float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.points.append([state.global_step, logs["loss"], logs["learning_rate"]])


def main(
    model: str, data: str, out: Path, config: dict, peft: dict | None, total: dict, kwargs: dict
) -> None:
    losses = Losses()
    trainer = SFTTrainer(
        model=load_model(model, kwargs),
        args=SFTConfig(
            output_dir=str(out),
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **config,
            **total,
        ),
        train_dataset=load_rows(Path(data), "train_data"),
        processing_class=load_tokenizer(model),
        peft_config=get_peft_config({"task_type": "CAUSAL_LM", **peft}) if peft else None,
        callbacks=[losses],
    )
    first = weights.snapshot(trainer.model)
    trainer.train()
    last = weights.snapshot(trainer.model)
    if trainer.accelerator.is_main_process:
        save_file(first, out / "first.safetensors")
        save_file(last, out / "last.safetensors")
        (out / "losses.json").write_text(json.dumps(losses.points))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(json.loads, sys.argv[4:]))
