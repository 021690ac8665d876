"""Tensors of which each of several processes holds a part (FSDP2)."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor as it is, or gathered from all processes, which must all ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def memory_of(value: torch.Tensor) -> int:
    """Where the values that this process holds begin."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return local.untyped_storage().data_ptr()


def assign(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy the whole ``value`` into ``target``, or this process's part of it."""
    if isinstance(target, DTensor):
        on_device = value.to(target.device, target.dtype)
        value = distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def parts_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state as plain tensors: what this process holds of it."""
    parts: dict[str, Any] = tree_map(
        lambda value: value.to_local() if isinstance(value, DTensor) else value, optimizer.state_dict()
    )
    return parts


def load_parts(optimizer: torch.optim.Optimizer, parts: dict[str, Any]) -> None:
    """Give an optimizer what :func:`parts_of` returned, in as many processes."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    for index, values in parts["state"].items():
        parameter = parameters[index]
        if isinstance(parameter, DTensor):
            parts["state"][index] = {name: _like(parameter, value) for name, value in values.items()}
    optimizer.load_state_dict(parts)


def _like(parameter: DTensor, value: Any) -> Any:
    """A part as a sharded tensor, as its parameter is; counters and the like as they are."""
    if not isinstance(value, torch.Tensor) or value.shape != parameter.to_local().shape or value.ndim == 0:
        return value
    return DTensor.from_local(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
