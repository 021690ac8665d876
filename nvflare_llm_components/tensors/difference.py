"""What a tensor has become, less what it was: made when it is read, so that no second model is held."""

from typing import Any

import torch

from nvflare_llm_components.tensors.blocks import reader_of
from nvflare_llm_components.tensors.lazy import BLOCK_LENGTH, LazyValue
from nvflare_llm_components.tensors.threads import side_by_side

_PART = 4 * BLOCK_LENGTH


class Difference(LazyValue):
    """``new - old`` in float32, with ``old`` as a tensor of ``new``'s dtype held it; both have one shape.

    Args:
        new: a tensor or lazy value, of a floating-point dtype.
        old: a tensor, array or lazy value.
    """

    def __init__(self, new: Any, old: Any) -> None:
        self._new, self._old = new, old

    def materialize(self) -> torch.Tensor:
        """See :class:`.LazyValue`.

        Raises:
            RuntimeError: the two have not as many values.
        """
        whole = torch.empty(self.shape, dtype=torch.float32)
        flat, new, old = whole.view(-1), reader_of(self._new), reader_of(self._old)

        def fill(part: slice) -> None:
            held = old(part).to(self._new.dtype)
            torch.sub(new(part).float(), held.float(), out=flat[part])

        side_by_side(fill, (slice(start, start + _PART) for start in range(0, flat.numel(), _PART)))
        return whole

    @property
    def shape(self) -> torch.Size:
        """See :class:`.LazyValue`."""
        return torch.Size(self._new.shape)

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`.LazyValue`."""
        return torch.float32
