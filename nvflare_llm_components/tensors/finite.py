"""Whether a tensor's values are finite, in one pass without a temporary of its size."""

import torch


def ends_of(value: torch.Tensor) -> tuple[float, float]:
    """Least and largest of a real tensor's values: NaN where any is; 0 and 0 where there are none."""
    if value.numel() == 0:
        return 0.0, 0.0
    low, high = torch.aminmax(value)
    return float(low), float(high)


def count_nonfinite(value: torch.Tensor) -> int:
    """Count NaN and infinite values, of floats; 0 for integers."""
    if not value.is_floating_point() or torch.tensor(ends_of(value)).isfinite().all():
        return 0
    return int((~torch.isfinite(value)).sum())
