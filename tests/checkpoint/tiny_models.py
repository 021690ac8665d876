"""Real models, as small as they can be, made in code: no hub is needed."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_tiny_llama(folder: Path, *, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """Save a two-layer Llama with a tokenizer, and return it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return model


def state_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return what the sites would send: detached clones by checkpoint name, a tied weight once."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}
