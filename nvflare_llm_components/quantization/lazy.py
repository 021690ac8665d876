"""Values that decode when they are asked for, and until then cost what travelled."""

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

import numpy as np
import torch

from nvflare_llm_components.quantization.wire import (
    RAW,
    Entry,
    has_nonfinite,
    to_numpy,
    unpack,
    unpacked_blocks,
    unpacked_part,
)
from nvflare_llm_components.tensors.convert import as_tensor, materialized
from nvflare_llm_components.tensors.lazy import LazyValue

SOURCE: Final = "source"
RestoreDtype = torch.dtype | Literal["source"] | None
"""Dtype of decoded weights: None is float32, or float64 as it was; SOURCE is what the sender had."""


class LazyTensor(LazyValue):
    """A checked payload that decodes on `materialize()`.

    Args:
        value: payload, checked; a lazy reference to it stays lazy.
        entry: its entry in the meta.
        restore_dtype: dtype of the decoded weights; None is float32.
    """

    def __init__(self, value: object, entry: Entry, restore_dtype: torch.dtype | None) -> None:
        self._value = value
        self._entry = entry
        self._restore_dtype = restore_dtype

    def materialize(self) -> torch.Tensor:
        """Decode into a new float tensor (a raw integer tensor comes as it is)."""
        payload = as_tensor(materialized(self._value))
        assert payload is not None, "was checked"
        return restored(unpack(payload, self._entry), self._restore_dtype)

    def blocks(self) -> Iterator[torch.Tensor]:
        """See :class:`.LazyValue`: decodes one block at a time."""
        payload = as_tensor(materialized(self._value))
        assert payload is not None, "was checked"
        for block in unpacked_blocks(payload, self._entry):
            yield restored(block, self._restore_dtype)

    def reader(self) -> Callable[[slice], torch.Tensor]:
        """See :class:`.LazyValue`: decodes what is asked for."""
        payload, size = as_tensor(materialized(self._value)), self.numel()
        assert payload is not None, "was checked"

        def read(part: slice) -> torch.Tensor:
            whole = unpacked_part(payload, self._entry, slice(part.start, min(part.stop, size)))
            return restored(whole, self._restore_dtype)

        return read

    @property
    def shape(self) -> torch.Size:
        """See :class:`LazyValue`."""
        return torch.Size(self._entry["shape"])

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`LazyValue`."""
        unpacked = getattr(torch, self._entry["dtype"]) if self._entry["codec"] == RAW else torch.float32
        return restored(torch.empty(0, dtype=unpacked), self._restore_dtype).dtype

    @property
    def has_nonfinite(self) -> bool:
        """Whether any weight is known to be NaN or infinite; nothing is decoded, nor read from a file."""
        return has_nonfinite(as_tensor(self._value), self._entry)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self._entry["shape"]))
        return f"LazyTensor({self._entry['codec']} {shape})"


def dtype_after(entry: Entry, restore_dtype: RestoreDtype) -> torch.dtype | None:
    """Dtype that a parameter is restored to; None is float32, or float64 as it was."""
    if restore_dtype != SOURCE:
        return restore_dtype
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    return dtype


def restored(weights: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Decoded weights in `dtype`; None is float32, or float64 as it was. Integers stay what they are."""
    is_narrow = weights.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if dtype is None:
        return weights.float() if is_narrow else weights
    return weights.to(dtype) if is_narrow or weights.dtype == torch.float64 else weights


def decoded(
    value: object, entry: Entry, restore_dtype: torch.dtype | None
) -> torch.Tensor | np.ndarray[Any, Any]:
    """Decode at once, into the container that the sender had."""
    weights = LazyTensor(value, entry, restore_dtype).materialize()
    is_numpy = entry.get("numpy") is True and weights.dtype != torch.bfloat16
    return to_numpy(weights) if is_numpy else weights
