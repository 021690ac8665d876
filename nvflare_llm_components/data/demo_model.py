"""A small Llama-architecture model with its own tokenizer, made and briefly trained from text alone.

It stands in for the pretrained model that one would take from a hub.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


def save_base_model(
    folder: Path,
    text: Sequence[str],
    *,
    vocab_size: int = 1024,
    hidden_size: int = 160,
    num_layers: int = 3,
    num_steps: int = 300,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> int:
    """Writes a Hugging Face folder: a byte-level BPE tokenizer and a Llama that has read ``text``.

    Args:
        folder: where to write.
        text: documents to learn the tokenizer and the weights from.
        vocab_size: size of the vocabulary at most.
        hidden_size: width, a multiple of 8.
        num_layers: number of layers.
        num_steps: optimizer steps on ``text``.
        seed: of the weights and of the order of reading.
        progress: called with the number of finished steps and the loss.

    Returns:
        The number of weights.
    """
    tokenizer = train_tokenizer(text, vocab_size)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(len(tokenizer), hidden_size, num_layers))
    _read(model, _token_stream(tokenizer, text), num_steps, progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def train_tokenizer(text: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE tokenizer: every string has tokens, and decoding gives it back.

    Args:
        text: documents to learn the merges from.
        vocab_size: size of the vocabulary at most, special tokens included.

    Returns:
        The tokenizer, padding with ``<pad>`` and ending with ``</s>``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=512
    )


def _config(vocab_size: int, hidden_size: int, num_layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _token_stream(tokenizer: PreTrainedTokenizerFast, text: Sequence[str]) -> torch.Tensor:
    """All documents as one row of token ids (int64), each ended by ``</s>``."""
    encoded = tokenizer([document + SPECIAL_TOKENS[2] for document in text])["input_ids"]
    return torch.tensor([token for document in encoded for token in document])


def _read(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    num_steps: int,
    progress: Callable[[int, float], None],
    batch_size: int = 8,
    length: int = 64,
    learning_rate: float = 3e-3,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps + 1)
    window = torch.arange(length)
    model.train()
    for step in range(1, num_steps + 1):
        starts = torch.randint(max(1, len(stream) - length), (batch_size, 1))
        batch = stream[(starts + window) % len(stream)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, float(loss.detach()))
