"""What a state dict must be before it may replace a good one."""

from collections.abc import Mapping

import torch

from nvflare_llm_components.tensors.errors import CheckpointError


def validate(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise unless a state dict is complete, of the right shapes, and finite.

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
    counts = {name: count_nonfinite(value) for name, value in tensors.items()}
    faults = [f"{name}: {count} of {tensors[name].numel()} values" for name, count in counts.items() if count]
    if faults:
        raise CheckpointError(
            f"{what}: expected finite values, found NaN or Inf in {len(faults)} of {len(tensors)} tensors "
            f"({', '.join(faults[:3])}{', ...' if len(faults) > 3 else ''}). "
            "Lower the learning rate, or send in bf16 instead of fp16."
        )


def count_nonfinite(value: torch.Tensor) -> int:
    """Count NaN and infinite values."""
    if not value.is_floating_point() or value.numel() == 0:
        return 0
    # One pass without a temporary the size of the tensor; both ends of a range with a NaN are NaN.
    low, high = torch.aminmax(value)
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int((~torch.isfinite(value)).sum())


def complain(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise CheckpointError, naming up to three tensors, unless names and shapes are those expected."""
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    reshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
        if names
    ]
    if faults:
        raise CheckpointError(f"{what}: expected {len(shapes)} tensors, found {', '.join(faults)}.")
