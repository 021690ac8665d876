"""Random state, so that what happens between two rounds cannot change the training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

RandomState = tuple[Any, ...]


def capture() -> RandomState:
    """The state of all generators that a training may draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def restore(state: RandomState) -> None:
    """Set all generators to what :func:`capture` returned."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def preserved() -> Iterator[None]:
    """Undo, at the end of the block, every draw made in it or by other threads meanwhile."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
