"""How far two states of a model lie from each other."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nvflare_llm_components.tensors.convert import tensor_of

_BLOCK = 2**18  # numbers at a time: their float64 copies stay in the cache, which is several times as fast


def distance(new: Mapping[str, Any], old: Mapping[str, Any]) -> float:
    """Euclidean norm of the difference of two states' floating-point tensors, summed in float64.

    Args:
        new: tensors, arrays or lazy values by name; one at a time is decoded.
        old: of the same shapes; a name that is missing here counts from zero.

    Returns:
        The norm: infinite or NaN where a value is.
    """
    return math.sqrt(sum(squared_distance(tensor_of(new[name]), old.get(name)) for name in sorted(new)))


def squared_distance(value: torch.Tensor, origin: Any) -> float:
    """The same of one tensor, squared; `origin` None is zero, and integers do not count."""
    if not value.is_floating_point():
        return 0.0
    before = value.new_zeros(()).expand(value.shape) if origin is None else tensor_of(origin)
    pairs = zip(_blocks(value), _blocks(before), strict=True)
    return sum(float((one.double() - other.double()).square_().sum()) for one, other in pairs)


def _blocks(value: torch.Tensor) -> Sequence[torch.Tensor]:
    blocks: Sequence[torch.Tensor] = value.detach().cpu().reshape(-1).split(_BLOCK)
    return blocks
