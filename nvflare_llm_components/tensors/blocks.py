"""A model's values in blocks that stay in the cache, each used before the next one is made."""

from collections.abc import Callable, Iterator

import torch

from nvflare_llm_components.tensors.convert import tensor_of
from nvflare_llm_components.tensors.lazy import BLOCK_LENGTH, LazyValue


def blocks_of(value: object) -> Iterator[torch.Tensor]:
    """Flat consecutive blocks of a tensor, an array, a number, or a lazy value.

    Each is valid until the next is asked for. Equal shapes give equal blocks.
    """
    if isinstance(value, LazyValue):
        yield from value.blocks()
    else:
        yield from tensor_of(value).detach().reshape(-1).split(BLOCK_LENGTH)


def reader_of(value: object) -> Callable[[slice], torch.Tensor]:
    """What gives slices of the flat values of a tensor, an array or a lazy value; see its `reader`."""
    if isinstance(value, LazyValue):
        return value.reader()
    flat = tensor_of(value).detach().reshape(-1)
    return lambda part: flat[part]
