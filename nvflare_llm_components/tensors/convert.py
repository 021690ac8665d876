"""The containers a weight may come in: torch, NumPy, or a value that is loaded on demand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def materialize_of(value: object) -> Callable[[], torch.Tensor] | None:
    """The `materialize` method of a lazy value, or None for any other value."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return None
    materialize = getattr(value, "materialize", None)
    return materialize if callable(materialize) else None


def materialized(value: object) -> object:
    """`value`, or what it stands for where it is lazy."""
    materialize = materialize_of(value)
    return materialize() if materialize else value


def as_tensor(value: object) -> torch.Tensor | None:
    """A tensor that shares the memory of a tensor or array; None for what torch cannot hold."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiubc":
        native = value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))
        return _from_numpy(native)
    return None


def tensor_of(value: object) -> torch.Tensor:
    """A tensor from a tensor, an array, a number, or a lazy value of one of them."""
    tensor: torch.Tensor = torch.as_tensor(materialized(value))
    return tensor


def shape_of(value: object) -> torch.Size:
    """Shape of what :func:`tensor_of` makes; a lazy value that does not tell it is made."""
    shape = getattr(value, "shape", None)
    return tensor_of(value).shape if shape is None else torch.Size(shape)


def nbytes_of(tensor: torch.Tensor) -> int:
    """Size of the values of a tensor in bytes."""
    return tensor.numel() * tensor.element_size()


def _from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor | None:
    writable = array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()
    try:
        return torch.from_numpy(writable)
    except TypeError:  # float128 and the like
        return None
