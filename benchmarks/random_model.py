"""Hugging Face folders with random weights, of any size, written one tensor at a time."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

MIB = 2**20
SHARD_BYTES = 2 * 2**30


def config_of_size(size_mib: int) -> LlamaConfig:
    """A Llama of about `size_mib` in float32; nothing is tied, so that all peers send the same."""
    hidden = 2048 if size_mib >= 800 else 1024 if size_mib >= 200 else 256
    vocab = 16 * hidden // 2
    layer = 4 * (4 * hidden * hidden + 3 * hidden * 4 * hidden) // MIB or 1
    embeddings = 2 * 4 * vocab * hidden // MIB
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=max(1, round((size_mib - embeddings) / layer)),
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=False,
    )


def config_of_40_million() -> LlamaConfig:
    """A Llama of 40 million weights with tied embeddings, whose vocabulary weighs as much as its layers."""
    return LlamaConfig(
        vocab_size=32768,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )


def llama_1b_config() -> LlamaConfig:
    """The shapes of Llama-3.2-1B: 1,235,814,400 weights in 146 tensors."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        max_position_embeddings=131072,
    )


def save_random_model(folder: Path, config: LlamaConfig) -> int:
    """Write config, generation config and random float32 weights; return the size of the weights in bytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    weight_map, shard, size = {}, {}, 0
    for name, shape in shapes.items():
        shard[name] = _random(name, shape)
        size += shard[name].nbytes
        if sum(value.nbytes for value in shard.values()) > SHARD_BYTES or name == list(shapes)[-1]:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            shard = {}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.empty(shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
