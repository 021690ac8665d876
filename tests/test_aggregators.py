"""The order-independent average: the same bits in any order, and the float64 mean within rounding."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel

from nvflare_llm_components.aggregators import OrderedAverage


def result_of(site: str, value: torch.Tensor, weight: int) -> FLModel:
    meta = {"client_name": site, "NUM_STEPS_CURRENT_ROUND": weight}
    return FLModel(params={"w": value}, params_type="FULL", metrics={"eval_loss": float(weight)}, meta=meta)


def average(results: list[FLModel]) -> FLModel:
    aggregator = OrderedAverage()
    aggregator.fl_ctx = FLContext()
    for result in results:
        aggregator.accept_model(result)
    return aggregator.aggregate_model()


@given(seed=st.integers(0, 1000), weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_mean_is_the_float64_mean_in_any_order(seed: int, weights: list[int]):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(7, generator=generator) for _ in weights]
    results = [result_of(f"site-{i}", v, w) for i, (v, w) in enumerate(zip(values, weights, strict=True))]
    expected = sum(v.double() * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    means = [
        average(list(order)).params["w"] for order in itertools.islice(itertools.permutations(results), 24)
    ]
    torch.testing.assert_close(means[0].double(), expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(mean, means[0]) for mean in means)


@given(weight=st.integers(1, 10**6))
@settings(deadline=None)
def test_one_site_gets_its_own_bits_back(weight: int):
    value = torch.randn(100, generator=torch.Generator().manual_seed(weight))
    assert torch.equal(average([result_of("a", value, weight)]).params["w"], value)


def test_inputs_are_not_changed():
    value = torch.ones(3)
    average([result_of("a", value, 3), result_of("b", value, 1)])
    assert torch.equal(value, torch.ones(3))


def test_metrics_are_averaged_with_the_same_weights():
    mean = average([result_of("a", torch.ones(1), 1), result_of("b", torch.ones(1), 3)])
    assert mean.metrics == {"eval_loss": 2.5}


def test_no_result_is_refused():
    with pytest.raises(ValueError, match="at least one site"):
        average([])


def test_a_site_with_other_tensors_is_named():
    other = FLModel(params={"v": torch.ones(1)}, params_type="FULL", meta={"client_name": "b"})
    with pytest.raises(ValueError, match=r"'b'.*v, w"):
        average([result_of("a", torch.ones(1), 1), other])
