"""Averages of one tensor, against NumPy in float64, and what a hostile minority can do to them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.averages import (
    Blocks,
    clip_factors,
    clipped_mean,
    coordinate_median,
    trimmed_mean,
    weighted_mean,
)
from nvflare_llm_components.tensors.norm import distance

SHAPES = st.sampled_from([(), (1,), (5,), (3, 4), (0,), (2, 0)])
SEEDS, NUM_SITES = st.integers(0, 10**6), st.integers(1, 9)


class Lazy:
    def __init__(self, value: torch.Tensor):
        self.value = value

    def materialize(self) -> torch.Tensor:
        return self.value


def drawn(seed: int, num_sites: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(num_sites)]


def numpy_of(values: list[torch.Tensor]) -> np.ndarray:
    return np.stack([value.double().numpy() for value in values])


def whole(blocks: Blocks, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.cat(list(blocks)).view(shape)


def assert_near(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float32
    assert tuple(found.shape) == expected.shape
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=1e-6)


@given(seed=SEEDS, num_sites=NUM_SITES, shape=SHAPES, num_trimmed=st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_trimmed_mean_is_that_of_a_sorted_array(seed, num_sites, shape, num_trimmed):
    values = drawn(seed, num_sites, shape)
    if 2 * num_trimmed >= num_sites:
        with pytest.raises(ValueError, match=f"more than {2 * num_trimmed} sites .* found {num_sites}"):
            trimmed_mean(values, num_trimmed)
        return
    kept = np.sort(numpy_of(values), axis=0)[num_trimmed : num_sites - num_trimmed]
    assert_near(whole(trimmed_mean([Lazy(value) for value in values], num_trimmed), shape), kept.mean(axis=0))


@given(seed=SEEDS, num_sites=NUM_SITES, shape=SHAPES)
@settings(max_examples=100, deadline=None)
def test_the_median_is_numpys(seed, num_sites, shape):
    values = drawn(seed, num_sites, shape)
    assert_near(whole(coordinate_median(values), shape), np.median(numpy_of(values), axis=0))


@given(seed=SEEDS, num_honest=st.integers(3, 7), num_hostile=st.integers(1, 2), bad=st.floats(-1e9, 1e9))
@settings(max_examples=100, deadline=None)
def test_a_minority_moves_no_weight_beyond_the_honest_ones(seed, num_honest, num_hostile, bad):
    honest = drawn(seed, num_honest, (6,))
    low, high = torch.stack(honest).amin(dim=0) - 1e-6, torch.stack(honest).amax(dim=0) + 1e-6
    values = [*honest, *[torch.full((6,), bad)] * num_hostile]
    for mean in (coordinate_median(values), trimmed_mean(values, num_hostile)):
        (mean,) = mean
        assert bool(((mean >= low) & (mean <= high)).all())


@given(seed=SEEDS, num_sites=NUM_SITES, shape=SHAPES, is_whole=st.booleans(), limit=st.floats(0.01, 10))
@settings(max_examples=100, deadline=None)
def test_no_update_moves_the_clipped_mean_further_than_the_limit(seed, num_sites, shape, is_whole, limit):
    values, centre = drawn(seed, num_sites, shape), drawn(seed + 1, 1, shape)[0] if is_whole else None
    origin = {"w": centre} if is_whole else None
    norms = [distance({"w": value}, origin or {}) for value in values]
    shares = [1 / num_sites] * num_sites
    found = clipped_mean(values, shares, clip_factors(norms, limit), centre)
    zero = np.zeros(shape) if centre is None else centre.double().numpy()
    updates = [value.double().numpy() - zero for value in values]
    clipped = [update * min(1, limit / max(np.linalg.norm(update), 1e-30)) for update in updates]
    assert_near(whole(found, shape), zero + np.mean(clipped, axis=0))


def test_the_median_is_the_limit_where_none_is_given():
    assert clip_factors([1.0, 2.0, 8.0]) == [1.0, 1.0, 0.25]
    assert clip_factors([0.0, 0.0, 1.0]) == [1.0, 1.0, 0.0]


@given(seed=SEEDS)
@settings(deadline=None)
def test_one_site_gets_its_own_bits_back(seed):
    (value,) = drawn(seed, 1, (100,))
    for mean in (weighted_mean([value], [1.0]), trimmed_mean([value], 0), coordinate_median([value])):
        assert torch.equal(whole(mean, (100,)), value)


@pytest.mark.parametrize("mean", [lambda values: weighted_mean(values, [0.5, 0.5]), coordinate_median])
@pytest.mark.parametrize("other", [1, 0, 3])
def test_a_value_of_another_size_is_not_spread_over_the_tensor(mean, other):
    for values in ([torch.zeros(6), torch.full((other,), 9.0)], [torch.full((other,), 9.0), torch.zeros(6)]):
        with pytest.raises(ValueError, match="expected values of one shape from all sites"):
            list(mean(values))
