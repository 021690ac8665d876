"""Memory of a step, beside what can be counted by hand; `benchmarks/step_memory.py` measures real ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from nvflare_llm_components.tensors.names import meta_model
from nvflare_llm_components.training.step_memory import StepMemory, step_memory
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def model(folder: Path) -> Any:
    return meta_model(folder)


def nbytes(folder: Path) -> int:
    return sum(4 * weight.numel() for weight in model(folder).parameters())


class OneLayer(torch.nn.Module):
    """What of it is alive when can be said by hand."""

    _supports_sdpa = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(100, 10, device="meta"))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"loss": self.weight.exp().sum()})


def test_a_layer_counted_by_hand():
    """The exponential is kept for its own gradient; the loss, and the gradient of it, are a number each."""
    memory = step_memory(OneLayer(), 2, 3)
    weight = 100 * 10 * 4
    assert (memory.weights, memory.gradients, memory.optimizer) == (weight, weight, 2 * weight)
    assert weight <= memory.activations <= weight + 16


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
