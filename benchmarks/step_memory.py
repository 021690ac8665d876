"""Whether `nvflare-llm sizes --memory` tells the truth: beside TRL's SFTTrainer, measured.

    python -m benchmarks.step_memory

Each case is three steps in a process of its own: the peak of its anonymous resident memory, less what it had
before there was a model. glibc is told to give each large buffer back at once; with `--plain` it is not, and
what it keeps is in the figure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any

import torch

from benchmarks.memory_sampler import anonymous_bytes
from benchmarks.random_model import config_of_40_million
from benchmarks.record import record

ROWS, LENGTH, STEPS = 2, 512, 3
CASES = ("full", "checkpoints", "lora", "lora, checkpoints", "bfloat16")
GIVES_BACK = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"}


def build(case: str) -> Any:
    """A Llama of 40 million weights, as a case has it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config_of_40_million(), attn_implementation="sdpa")
    if case == "bfloat16":
        model = model.to(torch.bfloat16)
    if "lora" in case:
        lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model


def train(case: str) -> int:
    """Peak bytes of three steps of TRL's trainer, above what was there before the model."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(WordLevel({"a": 0, "<pad>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="a")
    rows = Dataset.from_dict({name: [list(range(LENGTH))] * 8 for name in ("input_ids", "labels")})
    peaks, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.002):
            peaks.append(max(peaks.pop(), anonymous_bytes(os.getpid())))

    before = anonymous_bytes(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            max_length=LENGTH,
            gradient_checkpointing="checkpoints" in case,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SFTTrainer(build(case), settings, train_dataset=rows, processing_class=tokenizer)
        watcher = threading.Thread(target=watch)
        watcher.start()
        trainer.train()
        is_over.set()
        watcher.join()
    return peaks[0] - before


def told(case: str) -> dict[str, int]:
    """What `sizes --memory` says."""
    from nvflare_llm_components.training.step_memory import step_memory

    with torch.device("meta"):
        model = build(case)
    memory = step_memory(model, ROWS, LENGTH, gradient_checkpointing="checkpoints" in case)
    return vars(memory) | {"total": memory.total}


def main() -> None:
    """Measure each case and print it beside what was told."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plain", action="store_true", help="glibc as it is")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(train(options.case)))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.step_memory", "--case", case]
        variables = os.environ | ({} if options.plain else GIVES_BACK)
        output = subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout
        measured, expected = int(output.splitlines()[-1]), told(case)
        rows.append({"case": case, "measured_bytes": measured, "told": expected})
        sizes = f"{expected['total'] / 2**20:8.0f} MiB told{measured / 2**20:8.0f} measured"
        print(f"{case:20}{sizes}{expected['total'] / measured:7.2f} x")
    print(record("step_memory", rows, rows_of_a_step=ROWS, tokens=LENGTH, plain=options.plain))


if __name__ == "__main__":
    main()
