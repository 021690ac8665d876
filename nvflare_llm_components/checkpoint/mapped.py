"""Tensors that a deep copy shares instead of duplicating."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch


class _Share:
    """Stands as `__deepcopy__` on one tensor; refers to it weakly, so that it can still be freed at once."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = weakref.ref(tensor)

    def __call__(self, memo: dict[int, Any]) -> torch.Tensor | None:
        return self._tensor()


def share_on_deepcopy(tensors: Mapping[str, torch.Tensor]) -> None:
    """Make `copy.deepcopy` return these very tensors.

    For tensors mapped from a file, which nobody changes in place: FLARE deep-copies the global model for each
    broadcast, and that copy would be the one that lies in memory. The attribute is put on the instances,
    since FLARE's serializer is registered for Tensor itself and takes no subclass.
    """
    for tensor in tensors.values():
        tensor.__deepcopy__ = _Share(tensor)  # type: ignore[method-assign]
