"""A tiny Llama on disk, and as stock transformers loads it."""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.tiny import save_tiny_model


def save_tiny_llama(folder: Path, *, tied: bool = True) -> LlamaForCausalLM:
    """Save a two-layer Llama with a tokenizer, and return it as transformers loads it."""
    model = LlamaForCausalLM.from_pretrained(save_tiny_model(folder, tie_word_embeddings=tied))
    assert isinstance(model, LlamaForCausalLM)
    return model


def state_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return what the sites would send: detached clones by checkpoint name, a tied weight once."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}
