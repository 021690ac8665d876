"""A saved global model: weights, what `from_pretrained` needs beside them, and a record of their origin."""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.checkpoint.folder import write_weights
from nvflare_llm_components.checkpoint.swap import replace_folder
from nvflare_llm_components.checkpoint.tensor_files import stored_dtype

RECORD_FILE = "federation.json"
FORMAT_VERSION = 1
PACKAGES = ("nvflare-llm-components", "nvflare", "torch", "transformers", "peft", "safetensors")


def save_snapshot(
    target: Path,
    weights: Mapping[str, torch.Tensor],
    companions: Mapping[str, str | Path],
    record: Mapping[str, Any],
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Put a complete model folder in the place of `target`, or leave that as it was.

    Args:
        target: the folder.
        weights: tensors by checkpoint name.
        companions: text, or a file to copy, by file name.
        record: what federation.json says of the model's origin: round, job_id, metrics, parents.
        max_shard_size: bytes, or a string such as "5GB".
        dtype: what floating-point tensors are converted to; None keeps theirs.
    """
    stored = sorted({str(stored_dtype(value, dtype)).removeprefix("torch.") for value in weights.values()})

    def write(folder: Path) -> None:
        digests = _write_companions(folder, companions, stored)
        digests.update(write_weights(folder, weights, max_shard_size, dtype))
        text = {
            "format_version": FORMAT_VERSION,
            **record,
            "precision": "+".join(stored),
            "packages": _packages(),
            "sha256": digests,
        }
        (folder / RECORD_FILE).write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")

    replace_folder(target, write)


def _write_companions(
    folder: Path, companions: Mapping[str, str | Path], stored: list[str]
) -> dict[str, str]:
    digests = {}
    for name, content in companions.items():
        path = folder / name
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_text(content)
        if name == "config.json":
            _name_dtype(path, stored)
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def _name_dtype(config: Path, stored: list[str]) -> None:
    """Let config.json name the dtype on disk: `from_pretrained` converts to the one that stands there."""
    settings = json.loads(config.read_text())
    floating = [name for name in stored if name.startswith(("float", "bfloat"))]
    settings.pop("torch_dtype", None)
    settings["dtype"] = floating[0] if len(floating) == 1 else "float32"
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _packages() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
