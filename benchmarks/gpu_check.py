"""What needs a GPU: the tests marked gpu, and rounds of a model of Llama-3.2-1B's shape in bf16.

    python -m benchmarks.gpu_check

Says so and ends well where there is no GPU.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.workspace import Workspace
from nvflare.app_common.app_constant import AppConstants
from safetensors.torch import load_file

from benchmarks.random_model import config_of_size, llama_1b_config, save_random_model
from nvflare_llm_components.executors import HFSFTExecutor
from nvflare_llm_components.flare.headers import ERROR_HEADER
from tests.tiny import tiny_tokenizer, write_rows

GIB = 2**30


def context_of(folder: Path) -> FLContext:
    """A site's context, as FLARE makes it."""
    for name in ("startup", "local"):
        (folder / name).mkdir(parents=True)
    context = FLContext()
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, Workspace(str(folder), "site-1"), private=True)
    context.set_prop(ReservedKey.RUN_NUM, "job", private=False)
    context.set_prop(ReservedKey.IDENTITY_NAME, "site-1", private=False)
    return context


def train_task(model: Path, round_number: int, num_rounds: int) -> Shareable:
    """A round's message: the global model in bf16."""
    data = {
        name: value.bfloat16()
        for file in sorted(model.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    shareable = DXO(DataKind.WEIGHTS, data=data).to_shareable()
    shareable.set_header(AppConstants.CURRENT_ROUND, round_number)
    shareable.set_header(AppConstants.NUM_ROUNDS, num_rounds)
    return shareable


def train_rounds(folder: Path, args: argparse.Namespace) -> bool:
    """Run the rounds and print one line for each; returns whether all were answered."""
    model = folder / "model"
    os.environ.update(NVFLARE_LLM_MODEL=str(model), NVFLARE_LLM_DATA=str(folder))
    save_random_model(model, config_of_size(args.mib) if args.mib else llama_1b_config())
    tiny_tokenizer().save_pretrained(model)
    draw = random.Random(0)
    rows = [{"text": "".join(draw.choices("abcdefgh ", k=args.tokens))} for _ in range(8 * args.batch_size)]
    executor = HFSFTExecutor(
        model_name_or_path=str(model),
        train_data=str(write_rows(folder / "rows.jsonl", rows)),
        model_kwargs={"dtype": "bfloat16"},
        sft_config={
            "per_device_train_batch_size": args.batch_size,
            "max_length": args.tokens,
            "gradient_checkpointing": False,
        },
        local_steps=args.steps,
    )
    context = context_of(folder / "site")
    try:
        for number in range(args.rounds):
            reply = executor.execute("train", train_task(model, number, args.rounds), context, Signal())
            if reply.get_return_code() != ReturnCode.OK:
                print(reply.get_header(ERROR_HEADER))
                return False
            print_round(folder / "site" / "job" / "metrics.jsonl")
    finally:
        executor.handle_event(EventType.END_RUN, context)
    return True


def print_round(metrics: Path) -> None:
    """Print the last round's figures."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "round"][-1]
    idle = 1 - last["train_seconds"] / last["task_seconds"]
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else float("nan")
    print(
        f"round {last['round']}: {last['train_seconds'] / last['num_steps']:.3f} s a step, "
        f"{last['task_seconds']:.1f} s in all, {idle:.0%} of it not training, peak {peak:.1f} GiB on the GPU",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, help="a smaller model instead, in MiB of fp32")
    parser.add_argument("--rounds", type=int, default=3, help="the first also builds the trainer")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a round")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--without-gpu", action="store_true", help="run the rounds on the CPU")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.without_gpu:
        print("gpu-check: no CUDA device here, nothing to check.")
        return 0
    if torch.cuda.is_available():
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], check=False)
        if tests.returncode:
            return tests.returncode
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        return 0 if train_rounds(Path(folder), args) else 1


if __name__ == "__main__":
    sys.exit(main())
