"""Memory of a step, beside what can be counted by hand; `benchmarks/step_memory.py` measures real ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from nvflare_llm_components.tensors.names import meta_model
from nvflare_llm_components.training.step_memory import LiveBytes, StepMemory, step_memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration alone, of a model in which layers weigh more than the loss's own buffers."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=1000, hidden_size=512, num_hidden_layers=8,
        intermediate_size=1024, num_attention_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    config.save_pretrained(folder)
    return folder


def model(folder: Path) -> Any:
    return meta_model(folder)


def nbytes(folder: Path) -> int:
    return sum(4 * weight.numel() for weight in model(folder).parameters())


def test_storages_count_from_their_making_to_their_end():
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        kept = weight.exp()  # and its gradient, and the loss's own
        kept.sum().backward()
        assert 8000 <= live.peak <= 8016
        view = kept[:10]
        del kept
        assert live.now == 8000, "a view keeps its storage"
        del view
    assert live.now == 4000, "the gradient is alive"


def test_nothing_is_in_memory_and_weights_that_are_tied_count_once(folder: Path):
    memory = step_memory(model(folder), 1, 8)
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(
        n * nbytes(folder) for n in (1, 1, 2)
    )
    assert memory.total == sum(vars(memory).values())


def test_activations_grow_with_the_rows_and_shrink_by_checkpoints(folder: Path):
    one, two = (step_memory(model(folder), rows, 256).activations for rows in (8, 16))
    assert 1.9 < two / one < 2.1
    assert step_memory(model(folder), 8, 256, gradient_checkpointing=True).activations < 0.9 * one


def test_an_adapter_trains_little(folder: Path):
    with torch.device("meta"):
        adapted = get_peft_model(model(folder), LoraConfig(r=2, target_modules="all-linear"))
    adapter = sum(4 * weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    memory = step_memory(adapted, 2, 16, optim="adamw_8bit")
    assert (memory.gradients, memory.optimizer) == (adapter, adapter // 2)


def test_full_sharding_divides_what_the_processes_hold_but_not_what_they_compute(folder: Path):
    alone, ddp, full = (
        step_memory(model(folder), 4, 64, num_processes=n, sharding=sharding)
        for n, sharding in ((1, "none"), (2, "none"), (2, "full"))
    )
    assert ddp == StepMemory(alone.weights, 2 * alone.gradients, alone.optimizer, alone.activations)
    assert [full.weights, full.gradients, full.optimizer] == [
        size // 2 for size in (alone.weights, alone.gradients, alone.optimizer)
    ]
    assert full.activations == alone.activations
    assert 0 < full.gathered < 2 * alone.weights
