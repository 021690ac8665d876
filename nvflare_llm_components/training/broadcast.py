"""One process's tensors in all of them, over the process group: where not all are on one machine."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import distributed

from nvflare_llm_components.tensors.safetensors_file import Layout


class Broadcast(Mapping[str, Any]):
    """The first process's values, of which each is sent to the others when it is read.

    All processes must read the same names in the same order, each once.

    Args:
        layout: Shapes and dtypes.
        values: Of the first process; none in the others.
    """

    def __init__(self, layout: Layout, values: Mapping[str, torch.Tensor]):
        self._layout, self._values = layout, values

    def __getitem__(self, name: str) -> "_Sent":
        return _Sent(*self._layout[name], self._values.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


class _Sent:
    """A value that is sent, or received, when it is asked for."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, value: torch.Tensor | None):
        self._shape, self._dtype, self._value = shape, dtype, value

    def materialize(self) -> torch.Tensor:
        """The value; bytes travel, so that any dtype does."""
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        whole = torch.empty(self._shape, dtype=self._dtype) if self._value is None else self._value
        data = whole.contiguous().reshape(-1).view(torch.uint8).to(device)
        if data.numel():
            distributed.broadcast(data, src=0)
        return data.cpu().view(self._dtype).reshape(self._shape)
