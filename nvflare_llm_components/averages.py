"""Averages of several sites' values of one tensor: plain, and robust against some of the sites. Pure.

Values are tensors, arrays or lazy values, one a site, in the order of the sites' names, so that the sum has
the same bits in every run. All arithmetic is in float32. What is returned are the average's flat blocks: of
each site's value one block at a time is decoded.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nvflare_llm_components.tensors.blocks import blocks_of

Blocks = Iterator[torch.Tensor]


def weighted_mean(values: Sequence[Any], shares: Sequence[float]) -> Blocks:
    """The sum of each value times its share."""
    for blocks in _block_by_block(values):
        total = blocks[0] * shares[0]
        for block, share in zip(blocks[1:], shares[1:], strict=True):
            total += block * share
        yield total


def trimmed_mean(values: Sequence[Any], num_trimmed: int) -> Blocks:
    """The mean of each coordinate without its `num_trimmed` largest and smallest values.

    Formula: Yin et al., Byzantine-robust distributed learning, https://arxiv.org/abs/1803.01498, definition
    2; with all but the middle one or two trimmed it is the median of definition 1.

    Raises:
        ValueError: if nothing would be left.
    """
    if not 0 <= num_trimmed < len(values) / 2:
        raise ValueError(
            f"expected results from more than {2 * num_trimmed} sites to trim {num_trimmed} at each end, "
            f"found {len(values)}"
        )
    kept = slice(num_trimmed, len(values) - num_trimmed)
    return (torch.stack(blocks).sort(dim=0).values[kept].mean(dim=0) for blocks in _block_by_block(values))


def coordinate_median(values: Sequence[Any]) -> Blocks:
    """The median of each coordinate; of an even number of values the mean of the middle two."""
    return trimmed_mean(values, (len(values) - 1) // 2)


def clipped_mean(
    values: Sequence[Any], shares: Sequence[float], factors: Sequence[float], centre: torch.Tensor | None
) -> Blocks:
    """The mean of values that are drawn towards a centre, each by its factor from 0 to 1.

    Args:
        values: of the sites.
        shares: of the sites, their sum 1.
        factors: what is left of each site's distance from the centre; see :func:`clip_factors`.
        centre: None for zero.
    """
    scaled = [share * factor for share, factor in zip(shares, factors, strict=True)]
    mean = weighted_mean(values, scaled)
    if centre is None:
        return mean
    rest = 1 - math.fsum(scaled)
    centres = (block.to(torch.float32) for block in blocks_of(centre))
    return (total.add_(block, alpha=rest) for total, block in zip(mean, centres, strict=True))


def clip_factors(norms: Sequence[float], max_norm: float | None = None) -> list[float]:
    """What is left of each update, so that none is longer than `max_norm`; None is the median of all.

    Formula: Sun et al., Can you really backdoor federated learning?, https://arxiv.org/abs/1911.07963,
    section 4.
    """
    limit = statistics.median(norms) if max_norm is None else max_norm
    return [1.0 if norm <= limit else limit / norm for norm in norms]


def _block_by_block(values: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    """Blocks of all values, float32; a value of another size is refused, where torch would spread it out."""
    for blocks in zip(*map(blocks_of, values), strict=True):
        sizes = [block.numel() for block in blocks]
        if len(set(sizes)) > 1:
            raise ValueError(f"expected values of one shape from all sites, found blocks of {sizes} values.")
        yield [block.to(torch.float32) for block in blocks]
