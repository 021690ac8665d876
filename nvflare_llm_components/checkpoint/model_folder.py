"""A saved global model: weights, what `from_pretrained` needs beside them, and a record of their origin."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.checkpoint.manifest import MANIFEST_FILE, read_manifest, sha256, write_manifest
from nvflare_llm_components.checkpoint.model_card import CARD_FILE, model_card
from nvflare_llm_components.checkpoint.provenance import digest_of
from nvflare_llm_components.checkpoint.validate import Inspection, Tensors
from nvflare_llm_components.checkpoint.weight_files import ADAPTER_CONFIG, write_weights
from nvflare_llm_components.tensors.atomic import replace_folder
from nvflare_llm_components.tensors.links import link_or_copy
from nvflare_llm_components.tensors.safetensors_file import stored_dtype

PACKAGES = ("nvflare-llm-components", "nvflare", "torch", "transformers", "peft", "safetensors")


def save_model_folder(
    target: Path,
    weights: Tensors,
    companions: Mapping[str, bytes],
    record: Mapping[str, Any],
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    inspection: Inspection | None = None,
) -> None:
    """Put a complete model folder in the place of `target`, or leave that as it was.

    Args:
        target: the folder.
        weights: tensors by checkpoint name.
        companions: contents of the files beside the weights, by file name.
        record: what federation.json says of the model's origin: round, job_id, metrics, parents.
        max_shard_size: bytes, or a string such as "5GB".
        dtype: what floating-point tensors are converted to; None keeps theirs.
        inspection: sees each tensor as it is written; what it finds is in the record.

    Raises:
        CheckpointError: if the inspection finds a tensor that is not finite.
    """
    see = inspection.see if inspection else lambda name, start, block: None
    stored = sorted({str(stored_dtype(value, dtype)).removeprefix("torch.") for value in weights.values()})

    def write(folder: Path) -> None:
        digests = _write_companions(folder, companions, stored)
        digests.update(write_weights(folder, weights, max_shard_size, dtype, see))
        told = {**record, "update_norm": inspection.update_norm()} if inspection else record
        (folder / CARD_FILE).write_text(model_card(told, _adapter_of(folder)), encoding="utf-8")
        digests[CARD_FILE] = sha256(folder / CARD_FILE)
        origin = {"precision": "+".join(stored), "packages": _packages(), "sha256": digests}
        write_manifest(folder, {**told, **origin, "weights_sha256": digest_of(digests)})

    replace_folder(target, write)


def link_model_folder(source: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Put a second name of a saved model in the place of `target`: the same files on disk, its own record.

    Args:
        source: a folder written by `save_model_folder`.
        target: the folder.
        changes: what this one's record says otherwise.
    """

    def write(folder: Path) -> None:
        for path in source.iterdir():
            if path.name != MANIFEST_FILE:
                link_or_copy(path, folder / path.name)
        write_manifest(folder, {**read_manifest(source), **changes})

    replace_folder(target, write)


def _write_companions(folder: Path, companions: Mapping[str, bytes], stored: list[str]) -> dict[str, str]:
    digests = {}
    for name, content in companions.items():
        path = folder / name
        path.write_bytes(content)
        if name == "config.json":
            _name_dtype(path, stored)
        digests[name] = sha256(path)
    return digests


def _adapter_of(folder: Path) -> dict[str, Any] | None:
    config = folder / ADAPTER_CONFIG
    return dict(json.loads(config.read_text())) if config.is_file() else None


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
