"""Speed of saving and loading a model, beside `torch.save`, `torch.load` and `save_pretrained`, in one run.

    python -m benchmarks.checkpoint_io --mib 512

Each way is tried in turn, several times; the median counts. Saving ends when the bytes are on disk: peers
that do not sync are synced. Ours hashes every file, and loading verifies the hashes. "Touched" loads have
read each value once: mapped tensors are free until then.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.random_model import MIB, config_of_size, save_random_model
from benchmarks.record import record
from nvflare_llm_components.checkpoint.initial_model import load_initial_model
from nvflare_llm_components.checkpoint.manifest import verify_files
from nvflare_llm_components.checkpoint.model_folder import save_model_folder
from nvflare_llm_components.checkpoint.weight_files import map_weights


def synced(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def touched(tensors: dict[str, torch.Tensor]) -> None:
    for value in tensors.values():
        value.sum()


def ways(source: Path, folder: Path) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name; saves come before the loads of what they saved."""
    start = load_initial_model(str(source), None, 0)
    weights = {name: value.clone() for name, value in start.weights.items()}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ours, pickled, stock = folder / "ours", folder / "torch", folder / "stock"
    pickled.mkdir()

    def torch_save() -> None:
        torch.save(weights, pickled / "model.pt")
        synced(pickled)

    def stock_save() -> None:
        model.save_pretrained(stock)
        synced(stock)

    def verified() -> dict[str, torch.Tensor]:
        verify_files(ours)
        return map_weights(ours)

    return {
        "save: ours": lambda: save_model_folder(ours, weights, start.companions, {"round": 0}),
        "save: torch.save": torch_save,
        "save: save_pretrained": stock_save,
        "load: ours, verified, touched": lambda: touched(verified()),
        "load: ours, touched": lambda: touched(map_weights(ours)),
        "load: torch.load, touched": lambda: touched(torch.load(pickled / "model.pt", weights_only=True)),
        "load: safetensors load_file, touched": lambda: touched(load_file(source_file(ours))),
        "load: from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32),
    }


def source_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.disable_progress_bar()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="checkpoint_io-") as scratch:
        size = save_random_model(Path(scratch, "source"), config_of_size(args.mib))
        timed = ways(Path(scratch, "source"), Path(scratch))
        for repeat in range(args.repeats):
            for name, run in timed.items():
                begin = time.perf_counter()
                run()
                seconds.setdefault(name, []).append(time.perf_counter() - begin)
            print(f"repeat {repeat + 1} of {args.repeats} done", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peers = {"save": medians["save: torch.save"], "load": medians["load: torch.load, touched"]}
    print(f"\n{size / MIB:.0f} MiB float32{'':24}{'GB/s':>8}{'speed beside torch':>22}")
    for name, median in medians.items():
        print(f"{name:<40}{size / median / 1e9:>6.2f}{peers[name[:4]] / median:>18.2f} x")
    rows = [{"way": name, "seconds": sorted(values)} for name, values in seconds.items()]
    record("checkpoint_io", rows, size_bytes=size)


if __name__ == "__main__":
    main()
