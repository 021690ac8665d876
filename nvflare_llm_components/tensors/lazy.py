"""Values that are made when they are asked for, and behave as the tensors that they stand for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

BLOCK_LENGTH = 2**18
"""Weights in a block: two float32 buffers of it stay in a 2 MiB L2 cache. A codec's units divide it."""

_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul", "neg", "abs"),
    *("lt", "le", "gt", "ge", "getitem", "len"),
)


class LazyValue(ABC):
    """Stands for a tensor, and behaves as one.

    Who knows of it calls `materialize()` and holds one tensor at a time, as NVFlare's aggregation helper
    does. Who does not may add it, index it, give it to torch or NumPy: each such use decodes it anew. It
    can't be changed in place, since the change would be lost.
    """

    @abstractmethod
    def materialize(self) -> torch.Tensor:
        """Decode into a new tensor."""

    def blocks(self) -> Iterator[torch.Tensor]:
        """Flat consecutive blocks of `BLOCK_LENGTH` values, each valid until the next is asked for."""
        yield from self.materialize().reshape(-1).split(BLOCK_LENGTH)

    def reader(self) -> Callable[[slice], torch.Tensor]:
        """What gives the flat values of a slice from a multiple of `BLOCK_LENGTH` on, in any thread."""
        flat = self.materialize().reshape(-1)
        return lambda part: flat[part]

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the tensor; nothing is decoded."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor; nothing is decoded."""

    def numel(self) -> int:
        """Number of its values; nothing is decoded."""
        return self.shape.numel()

    def dim(self) -> int:
        """Number of its dimensions; nothing is decoded."""
        return len(self.shape)

    def element_size(self) -> int:
        """Bytes of a value of its dtype; nothing is decoded."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of its values; nothing is decoded."""
        return self.numel() * self.element_size()

    def is_floating_point(self) -> bool:
        """Whether its dtype is one of floats; nothing is decoded."""
        return self.dtype.is_floating_point

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What torch calls for a function of a lazy value."""
        return func(*_all_materialized(args), **_all_materialized(kwargs or {}))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """What NumPy calls; bfloat16, which it lacks, comes as float32."""
        weights = self.materialize()
        return np.asarray((weights.float() if weights.dtype == torch.bfloat16 else weights).numpy(), dtype)

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of a tensor, but for what would change it in place."""
        if name.startswith("_") or name.endswith("_"):
            raise AttributeError(f"{type(self).__name__} has no {name!r}.")
        return getattr(self.materialize(), name)


class Deferred(LazyValue):
    """A tensor that a function makes block by block, of a shape and dtype that are known before.

    Args:
        make: makes its blocks, anew at each call.
        shape: of the tensor.
        dtype: of the tensor.
    """

    def __init__(
        self, make: Callable[[], Iterator[torch.Tensor]], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        self._make, self._shape, self._dtype = make, torch.Size(shape), dtype

    def materialize(self) -> torch.Tensor:
        """See :class:`LazyValue`.

        Raises:
            ValueError: its blocks hold fewer values than its shape.
        """
        whole, start = torch.empty(self._shape, dtype=self._dtype), 0
        for block in self._make():
            whole.view(-1)[start : start + block.numel()] = block
            start += block.numel()
        if start != whole.numel():
            raise ValueError(f"expected blocks of {whole.numel()} values in all, found {start}.")
        return whole

    def blocks(self) -> Iterator[torch.Tensor]:
        """See :class:`LazyValue`."""
        return self._make()

    @property
    def shape(self) -> torch.Size:
        """See :class:`LazyValue`."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`LazyValue`."""
        return self._dtype


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: LazyValue, *others: Any) -> Any:
        return getattr(self.materialize(), name)(*_all_materialized(others))

    return operator


for _name in _OPERATORS:  # Python looks for operators in the class, not by __getattr__
    setattr(LazyValue, f"__{_name}__", _operator(f"__{_name}__"))


def _all_materialized(values: Any) -> Any:
    """Arguments of a function with each lazy value among them decoded."""
    if isinstance(values, dict):
        return {key: _all_materialized(value) for key, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(_all_materialized(value) for value in values)
    return values.materialize() if isinstance(values, LazyValue) else values
