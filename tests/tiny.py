"""Tiny models, tokenizers and data made in code: no hub, no download, a second to train."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(*, chat_template: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a byte, and three special tokens."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE if chat_template else None
    return fast


def tiny_config(**overrides: object) -> LlamaConfig:
    """A Llama of about 40 thousand weights with tied embeddings."""
    settings: dict[str, object] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(settings | overrides))


def save_tiny_model(folder: Path, *, seed: int = 0, chat_template: bool = False, **config: object) -> Path:
    """Writes a Hugging Face folder (config, generation config, weights, tokenizer) and returns it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(**config))
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(folder)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    """Writes JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_site_data(root: Path, sites: list[str], *, num_rows: int = 12, seed: int = 0) -> Path:
    """Writes ``<root>/<site>/{training,validation}.jsonl``, other rows for each site."""
    draw = random.Random(seed)
    for site in sites:
        for split, count in (("training", num_rows), ("validation", 4)):
            numbers = [(draw.randrange(10), draw.randrange(10)) for _ in range(count)]
            rows: list[dict[str, object]] = [
                {"input": f"{site}: {a} + {b}?", "output": str(a + b)} for a, b in numbers
            ]
            write_rows(root / site / f"{split}.jsonl", rows)
    return root
