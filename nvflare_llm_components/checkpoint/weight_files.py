"""A folder with weights in Hugging Face's layout: one safetensors file, or shards with an index."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.lazy import LazyValue
from nvflare_llm_components.tensors.safetensors_file import (
    See,
    map_tensor_file,
    stored_dtype,
    write_tensor_file,
)

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds a PEFT adapter, not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def map_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder by their names in the files, mapped from them.

    Raises:
        CheckpointError: if there are no safetensors, or a shard is missing, truncated or incomplete.
    """
    if (folder / ADAPTER_FILE).is_file():
        return map_tensor_file(folder / ADAPTER_FILE)
    # In the order of transformers, for a folder that has both.
    if (folder / MODEL_FILE).is_file():
        return map_tensor_file(folder / MODEL_FILE)
    if (folder / INDEX_FILE).is_file():
        return _map_shards(folder)
    raise CheckpointError(_no_weights(folder))


def write_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor | LazyValue],
    max_shard_size: int | str,
    dtype: torch.dtype | None,
    see: See = lambda name, start, block: None,
) -> dict[str, str]:
    """Write tensors as one file, or as shards with an index where they don't fit into one.

    Args:
        folder: an existing folder; an adapter's configuration in it makes these the adapter's tensors.
        tensors: values by checkpoint name.
        max_shard_size: bytes, or a string such as "5GB".
        dtype: what floating-point tensors are converted to; None keeps theirs.
        see: called with each block before it is converted.

    Returns:
        SHA-256 by file name.
    """
    if is_adapter(folder):
        return {ADAPTER_FILE: write_tensor_file(folder / ADAPTER_FILE, tensors, dtype, see=see)}
    sizes = {
        name: torch.empty(value.shape, dtype=stored_dtype(value, dtype), device="meta")
        for name, value in tensors.items()
    }
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    digests = {
        file: write_tensor_file(folder / file, {name: tensors[name] for name in names}, dtype, see=see)
        for file, names in plan.filename_to_tensors.items()
    }
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return digests


def _map_shards(folder: Path) -> dict[str, torch.Tensor]:
    weight_map = _weight_map(folder / INDEX_FILE)
    shards = {file: map_tensor_file(folder / file) for file in sorted(set(weight_map.values()))}
    missing = [name for name, file in weight_map.items() if name not in shards[file]]
    if missing:
        raise CheckpointError(
            f"{folder}: the index places {missing[:3]} ({len(missing)} in all) in shards that lack them. "
            "Copy or download the shards again."
        )
    return {name: shards[file][name] for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index}: expected an index with a 'weight_map', found {error!r}. "
            "Copy or download the file again."
        ) from error
    for file in weight_map.values():
        if Path(file).name != file:
            raise CheckpointError(f"{index}: expected shards beside the index, found the path '{file}'.")
    return weight_map


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if not pickled:
        return (
            f"{folder}: expected {MODEL_FILE}, {INDEX_FILE} or {ADAPTER_FILE}, found none of them. "
            "Give the folder that `save_pretrained` wrote."
        )
    return (
        f"{folder}: expected safetensors, found only {pickled}: pickles, which could run code when read. "
        "Where you trust them, convert them once: python -c "
        '"from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
    )
