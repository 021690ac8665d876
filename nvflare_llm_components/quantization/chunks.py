"""Work on a tensor in chunks that stay in cache, so that scratch memory is bounded, too."""

from collections.abc import Iterator

import torch

from nvflare_llm_components.tensors.lazy import BLOCK_LENGTH

STREAMED = 1 << 20  # work without a buffer is bound by memory, not by cache
_ACCELERATOR_CHUNK = 1 << 24  # there a kernel launch costs more than a cache miss


def chunk_size(device: torch.device) -> int:
    """Weights worked on at a time: a power of two, and a multiple of every legal block."""
    return BLOCK_LENGTH if device.type == "cpu" else _ACCELERATOR_CHUNK


def chunks(num_weights: int, device: torch.device, step: int | None = None) -> Iterator[slice]:
    """Consecutive slices of `step` (by default :func:`chunk_size`) that cover `num_weights` weights."""
    step = step or chunk_size(device)
    for start in range(0, num_weights, step):
        yield slice(start, min(start + step, num_weights))
