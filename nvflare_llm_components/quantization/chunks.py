"""Work on a tensor in chunks, one on each core: what a codec needs beside its payload is bounded."""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch

from nvflare_llm_components.tensors.threads import num_workers, side_by_side

R = TypeVar("R")
_CHUNK = 1 << 20  # on less the interpreter's threads wait for each other
_ACCELERATOR_CHUNK = 1 << 24  # there the launch of a kernel costs more than memory


class FlatValues(Protocol):
    """Floating-point weights in a row, some of which can be looked at: a flat tensor, or what makes them."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def numel(self) -> int:
        """How many there are."""

    def __getitem__(self, part: slice) -> torch.Tensor:
        """Those of a chunk."""


class MadeValues:
    """Weights that are made as they are read: float32, on the CPU.

    Args:
        shape: of what they are in a row.
        make: makes those of a slice, anew each time; it is called in threads.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, shape: torch.Size, make: Callable[[slice], torch.Tensor]) -> None:
        self.shape, self._make = shape, make

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "MadeValues":
        """The weights of a tensor of any shape and floating-point dtype."""
        flat = tensor.cpu().reshape(-1)
        return cls(tensor.shape, lambda part: flat[part].float())

    def numel(self) -> int:
        """See :class:`FlatValues`."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of one."""
        return self.dtype.itemsize

    def __getitem__(self, part: slice) -> torch.Tensor:
        """See :class:`FlatValues`."""
        return self._make(part)

    def parts(self) -> Iterator[slice]:
        """Slices that cover them, of a chunk each."""
        return chunks(slice(0, self.numel()), self.device)


def flat_values(weights: "torch.Tensor | FlatValues") -> FlatValues:
    """The weights of a tensor of any shape in a row."""
    return weights.detach().reshape(-1) if isinstance(weights, torch.Tensor) else weights


def chunk_size(device: torch.device) -> int:
    """Weights worked on at a time: a power of two, and a multiple of every legal block."""
    return _CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK


def chunks(whole: slice, device: torch.device, step: int | None = None) -> Iterator[slice]:
    """Consecutive slices of `step` (by default :func:`chunk_size`) that cover a slice."""
    step = step or chunk_size(device)
    for start in range(whole.start, whole.stop, step):
        yield slice(start, min(start + step, whole.stop))


def each_share(call: Callable[[slice], R], num_weights: int, device: torch.device) -> list[R]:
    """Call for slices of whole chunks that cover `num_weights` weights, one on each core, or all at once.

    Returns:
        What the calls return, in the order of the slices.
    """
    whole = slice(0, num_weights)
    if device.type != "cpu":
        return [call(whole)]  # a thread of its own would have a stream of its own
    num_chunks = -(-num_weights // chunk_size(device))
    step = -(-num_chunks // num_workers()) * chunk_size(device)
    return side_by_side(call, chunks(whole, device, step) if step else [whole])
