"""Work on a tensor in cache-sized chunks, several at a time.

On a CPU a chunk is just small enough that torch works on it in the calling thread, and threads of ours take
spans of chunks. Torch's own threads would meet at a barrier after each operation on each chunk, and on a busy
machine, as one that trains is, every meeting waits for whoever lost its core.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_CPU_CHUNK = 1 << 15  # torch's grain size; two float32 buffers of it stay in any L2 cache
_ACCELERATOR_CHUNK = 1 << 24  # there a kernel launch costs more than a cache miss
_MIN_SPAN = 1 << 20  # weights for which a thread of one's own is worth its start


def chunk_size(device: torch.device, multiple_of: int = 1) -> int:
    """Weights worked on at a time, a multiple of a power of two that is at most 2**18."""
    return max(_CPU_CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK, multiple_of)


def chunks(span: slice, chunk: int) -> Iterator[slice]:
    """Consecutive slices of `chunk` that cover a span."""
    for start in range(span.start, span.stop, chunk):
        yield slice(start, min(start + chunk, span.stop))


def in_spans(
    num_weights: int, device: torch.device, chunk: int, work: Callable[[slice], Result]
) -> list[Result]:
    """Call `work` on consecutive spans of whole chunks, in threads on a CPU; results are in order."""
    num_threads = torch.get_num_threads() if device.type == "cpu" else 1
    num_spans = max(1, min(num_threads, num_weights // _MIN_SPAN))
    step = -(-num_weights // (num_spans * chunk)) * chunk
    spans = list(chunks(slice(0, num_weights), max(step, chunk)))
    if len(spans) <= 1:
        return [work(span) for span in spans]
    with ThreadPoolExecutor(len(spans)) as pool:
        return list(pool.map(work, spans))
