"""Averages of several sites' values of one tensor: plain, and robust against some of the sites. Pure.

Values are tensors, arrays or lazy values, one a site, in the order of the sites' names, so that the sum has
the same bits in every run. All arithmetic is in float32.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from nvflare_llm_components.tensors.convert import tensor_of

_BLOCK = 2**20  # weights that are sorted at a time


def weighted_mean(values: Sequence[Any], shares: Sequence[float]) -> torch.Tensor:
    """The sum of each value times its share; one value at a time is decoded."""
    total = _decoded(values[0]) * shares[0]
    for value, share in zip(values[1:], shares[1:], strict=True):
        total += _decoded(value) * share
    return total


def trimmed_mean(values: Sequence[Any], num_trimmed: int) -> torch.Tensor:
    """The mean of each coordinate without its `num_trimmed` largest and smallest values.

    All sites' values of the one tensor are held decoded. Formula: Yin et al., Byzantine-robust distributed
    learning, https://arxiv.org/abs/1803.01498, definition 2; with all but the middle one or two trimmed it
    is the median of definition 1.

    Raises:
        ValueError: if nothing would be left.
    """
    if not 0 <= num_trimmed < len(values) / 2:
        raise ValueError(
            f"expected results from more than {2 * num_trimmed} sites to trim {num_trimmed} at each end, "
            f"found {len(values)}"
        )
    decoded = [_decoded(value) for value in values]
    blocks = zip(*(value.reshape(-1).split(_BLOCK) for value in decoded), strict=True)
    kept = slice(num_trimmed, len(values) - num_trimmed)
    means = [torch.stack(block).sort(dim=0).values[kept].mean(dim=0) for block in blocks]
    return torch.cat(means).view(decoded[0].shape) if means else decoded[0]


def coordinate_median(values: Sequence[Any]) -> torch.Tensor:
    """The median of each coordinate; of an even number of values the mean of the middle two."""
    return trimmed_mean(values, (len(values) - 1) // 2)


def clipped_mean(
    values: Sequence[Any], shares: Sequence[float], factors: Sequence[float], centre: torch.Tensor | None
) -> torch.Tensor:
    """The mean of values that are drawn towards a centre, each by its factor from 0 to 1.

    Args:
        values: of the sites.
        shares: of the sites, their sum 1.
        factors: what is left of each site's distance from the centre; see :func:`clip_factors`.
        centre: None for zero.
    """
    scaled = [share * factor for share, factor in zip(shares, factors, strict=True)]
    total = weighted_mean(values, scaled)
    return total if centre is None else total.add_(_decoded(centre), alpha=1 - math.fsum(scaled))


def clip_factors(norms: Sequence[float], max_norm: float | None = None) -> list[float]:
    """What is left of each update, so that none is longer than `max_norm`; None is the median of all.

    Formula: Sun et al., Can you really backdoor federated learning?, https://arxiv.org/abs/1911.07963,
    section 4.
    """
    limit = statistics.median(norms) if max_norm is None else max_norm
    return [1.0 if norm <= limit else limit / norm for norm in norms]


def _decoded(value: Any) -> torch.Tensor:
    return tensor_of(value).to(torch.float32)
