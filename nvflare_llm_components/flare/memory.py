"""Giving freed memory back to the system, which glibc's allocator would rather keep."""

import ctypes
import gc
import os
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Below it a buffer is reused, such as a codec's for a chunk; above it every free goes back at once.
MMAP_THRESHOLD_BYTES = 8 * 2**20
# Above it free memory at a heap's end goes back. By default it is less than a block of a tensor, so that the
# system is asked for each block's pages anew: that took longer than the arithmetic.
TRIM_THRESHOLD_BYTES = 8 * 2**20


def keep_large_buffers_apart() -> None:
    """Let the allocator map each large buffer on its own, for the rest of the process; glibc only.

    Its threshold grows to 32 MiB with the buffers that are freed, unless it is set; tensors of that size
    would then lie in heaps, between small objects that outlive them.
    """
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def pass_over_what_is_there() -> None:
    """Let later collections of garbage pass over what is there now: modules, classes, a job's parts."""
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Collect garbage and return the free pages of all heaps to the system; only the former without glibc."""
    gc.collect()
    trim()


def trim() -> None:
    """Return the free pages of all heaps to the system, in milliseconds; nothing without glibc."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _libc() -> Any:
    return ctypes.CDLL(None) if os.name == "posix" else None
