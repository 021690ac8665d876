"""How far two states of a model lie from each other."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch

from nvflare_llm_components.tensors.blocks import blocks_of
from nvflare_llm_components.tensors.threads import undivided


def distance(new: Mapping[str, Any], old: Mapping[str, Any]) -> float:
    """Euclidean norm of the difference of two states' floating-point tensors, summed in float64.

    Args:
        new: tensors, arrays or lazy values by name; a block at a time is decoded.
        old: of the same shapes; a name that is missing here counts from zero.

    Returns:
        The norm: infinite or NaN where a value is.

    Raises:
        ValueError: for another shape.
    """
    return undivided(lambda: _distance(new, old))


def _distance(new: Mapping[str, Any], old: Mapping[str, Any]) -> float:
    squares = 0.0
    for name in sorted(new):
        others = blocks_of(old[name]) if name in old else itertools.repeat(None)
        pairs = zip(blocks_of(new[name]), others, strict=name in old)
        squares += sum(squared_distance(block, other) for block, other in pairs)
    return math.sqrt(squares)


def squared_distance(block: torch.Tensor, origin: torch.Tensor | None) -> float:
    """The same of one block, squared; `origin` None is zero, and integers do not count."""
    if not block.is_floating_point():
        return 0.0
    step = block.detach().cpu()
    step = step.to(torch.promote_types(step.dtype, torch.float32))
    if origin is not None:
        if origin.shape != block.shape:
            raise ValueError(f"expected values of shape {tuple(block.shape)}, found {tuple(origin.shape)}.")
        step = step - origin.cpu()
    return squared_norm(step)


def squared_norm(block: torch.Tensor) -> float:
    """Sum of the squares of a flat tensor on the CPU, in float64: infinite or NaN where a value is."""
    wide = block.to(torch.float64)
    return float(torch.dot(wide, wide))
