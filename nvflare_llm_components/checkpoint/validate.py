"""What a state dict must be before it may replace a good one."""

import math
from collections.abc import Mapping

import torch

from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.finite import count_nonfinite
from nvflare_llm_components.tensors.lazy import LazyValue
from nvflare_llm_components.tensors.norm import squared_distance
from nvflare_llm_components.tensors.text import listed

Tensors = Mapping[str, torch.Tensor | LazyValue]
Shapes = Mapping[str, tuple[int, ...]]


def validate(tensors: Tensors, shapes: Shapes, what: str) -> None:
    """Raise unless a state dict is complete and of the right shapes; no value is made.

    Args:
        tensors: values by checkpoint name.
        shapes: the shapes that they must have, by name.
        what: what the error calls the state dict.

    Raises:
        CheckpointError: naming the tensors.
    """
    if not tensors:
        raise CheckpointError(
            f"{what} is empty: expected {len(shapes)} tensors. No site's result was aggregated; "
            "see the errors above this one in the log."
        )
    complain(tensors, shapes, what)


class Inspection:
    """Looks at each block of a model while it is in memory to be saved.

    Args:
        before: the model before it, by name; other tensors are not looked at.
        what: what the error calls the model.
    """

    def __init__(self, before: Mapping[str, torch.Tensor], what: str) -> None:
        self._before, self._what = before, what
        self._squares: dict[str, float] = {}
        self._num_nonfinite: dict[str, int] = {}

    def see(self, name: str, start: int, block: torch.Tensor) -> None:
        """Count what is not finite in one block of a tensor, from `start` on, and how far it has moved."""
        if name not in self._before:
            return
        before = self._before[name].reshape(-1)[start : start + block.numel()]
        square = squared_distance(block, before)
        self._squares[name] = self._squares.get(name, 0.0) + square
        # The sum of squares is finite only where all values are, and costs no second look at them.
        if not math.isfinite(square):
            self._num_nonfinite[name] = self._num_nonfinite.get(name, 0) + count_nonfinite(block)

    def update_norm(self) -> float | None:
        """Euclidean norm of all that has changed, in float64; None where it overflows.

        Raises:
            CheckpointError: naming the tensors that are not finite.
        """
        faults = [
            f"{name}: {count} of {self._before[name].numel()} values"
            for name, count in self._num_nonfinite.items()
            if count
        ]
        if faults:
            raise CheckpointError(
                f"{self._what}: expected finite values, found NaN or Inf in {len(faults)} of "
                f"{len(self._squares)} tensors ({listed(faults)}). "
                "Lower the learning rate, or send in bf16 instead of fp16."
            )
        norm = math.sqrt(sum(self._squares[name] for name in sorted(self._squares)))
        return norm if math.isfinite(norm) else None


def complain(tensors: Tensors, shapes: Shapes, what: str) -> None:
    """Raise CheckpointError, naming up to three tensors, unless names and shapes are those expected."""
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    reshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = [
        f"{len(names)} {kind} ({listed(names)})"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
        if names
    ]
    if faults:
        raise CheckpointError(f"{what}: expected {len(shapes)} tensors, found {', '.join(faults)}.")
