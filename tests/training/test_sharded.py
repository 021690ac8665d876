"""Parts of tensors, in a group of one: what is taken out of a sharded tensor or optimizer goes back in."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nvflare_llm_components.training.sharded import assign, load_parts, memory_of, parts_of, whole


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded(value: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(value, mesh, [Shard(0)])


def test_a_value_goes_in_and_comes_out(mesh):
    target, value = sharded(torch.zeros(5, 3), mesh), torch.arange(15, dtype=torch.float64).reshape(5, 3)
    before = memory_of(target)
    assign(target, value)
    assert torch.equal(whole(target), value.float())
    assert memory_of(target) == before
    plain = torch.zeros(2)
    assign(plain, torch.ones(2))
    assert torch.equal(whole(plain), torch.ones(2))


def optimizer_of(mesh: DeviceMesh) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(sharded(torch.randn(4, 3), mesh)), torch.nn.Parameter(torch.randn(2))]
    return torch.optim.AdamW(parameters, lr=0.1)


def step(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = parameter.detach() * 2 + 1
    optimizer.step()
    return [whole(parameter.detach()) for parameter in parameters]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_parts_in_the_machines_memory_are_trained_as_others(mesh, tmp_path, name):
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    found = []
    for policy in (OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        with torch.no_grad():
            assign(model.weight, torch.arange(12.0).reshape(3, 4))
        optimizer = kinds[name](model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.ones(2, 4)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            torch.save(parts_of(optimizer), tmp_path / "parts.pt")
            optimizer = kinds[name](model.parameters(), lr=0.1)
            load_parts(optimizer, torch.load(tmp_path / "parts.pt", weights_only=True))
        found.append([whole(value.detach()) for value in model.state_dict().values()])
    assert all(map(torch.equal, *found))


def plain(values: Any) -> bool:
    return not any(
        isinstance(value, DTensor) for state in values["state"].values() for value in state.values()
    )


def test_an_optimizer_goes_on_from_its_parts(mesh, tmp_path):
    one, other = optimizer_of(mesh), optimizer_of(mesh)
    step(one)
    parts = parts_of(one)
    assert plain(parts)
    torch.save(parts, tmp_path / "parts.pt")
    for mine, theirs in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        theirs.data.copy_(mine.data)
    load_parts(other, torch.load(tmp_path / "parts.pt", weights_only=True))
    assert all(map(torch.equal, step(one), step(other)))
