"""Averages as FLARE's controllers use them: the same bits in any order, and what they withstand."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from nvflare_llm_components.aggregators import (
    CoordinateMedian,
    NormClippedMean,
    OrderedAverage,
    TrimmedMean,
)
from nvflare_llm_components.persistors import SafetensorsModelPersistor
from nvflare_llm_components.policy.schema import PolicyError
from tests.federation import Federation
from tests.flare.test_gate import LOOK, SITES, honest, one_round, saved
from tests.tasks import weights_of
from tests.tiny import save_tiny_model


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


@pytest.mark.parametrize("weight", [0, -9.99, float("nan"), float("inf"), "many", 10**400, True, None])
def test_a_weight_that_is_none_is_refused_and_the_result_is_not_kept(weight: Any):
    aggregator = OrderedAverage()
    aggregator.fl_ctx = FLContext()
    aggregator.accept_model(result_of("a", torch.ones(1), 10))
    forged = result_of("b", torch.zeros(1), 1)
    forged.meta["NUM_STEPS_CURRENT_ROUND"] = weight
    with pytest.raises(PolicyError, match="weight above 0"):
        aggregator.accept_model(forged)
    assert torch.equal(aggregator.aggregate_model().params["w"], torch.ones(1))


def test_differences_among_weights_are_refused():
    other = result_of("b", torch.ones(1), 1)
    other.params_type = "DIFF"
    with pytest.raises(ValueError, match=r"'b'.*params_type"):
        average([result_of("a", torch.ones(1), 1), other])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def job_with(aggregator: Any, folder: Path, model: Path, data_kind: str = DataKind.WEIGHT_DIFF) -> Federation:
    results = {"data_kind": str(getattr(data_kind, "value", data_kind))}
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model), results=results)
    workflow = FedAvg(num_clients=3, num_rounds=1, aggregator=aggregator, **LOOK)
    return Federation(folder, workflow, {"persistor": persistor})


def moved(job: Federation, model: Path) -> set[float]:
    """By how much the saved model differs from the first one."""
    start, last = weights_of(model), weights_of(job.run_dir / "global_model/last")
    return {round(float(v), 4) for name in start for v in (last[name] - start[name]).unique()}


@pytest.mark.parametrize("data_kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [
        (lambda: TrimmedMean(), 2.0),
        (lambda: CoordinateMedian(), 2.0),
        (lambda: NormClippedMean(), (1 + 2 + 2) / 3),
        (lambda: NormClippedMean(max_norm=0.0), 0.0),
        (lambda: OrderedAverage(max_norm_ratio=3), 1.5),
        (lambda: OrderedAverage(), (1 + 2 + 1e6) / 3),
    ],
    ids=["trimmed", "median", "clipped", "clipped to nothing", "left out", "plain"],
)
def test_what_one_hostile_update_within_the_range_can_do(
    aggregator: Any, expected: float, data_kind: str, model: Path, tmp_path: Path
):
    replies = {}
    for site, step in zip(SITES, (1.0, 1e6, 2.0), strict=True):
        reply = honest(model, step, kind=data_kind)
        if data_kind == DataKind.WEIGHTS:
            reply["DXO"]["data"] = {n: v + step for n, v in weights_of(model).items()}
        replies[site] = reply
    job = one_round(job_with(aggregator(), tmp_path, model, data_kind), replies)
    assert job.panic is None
    tolerance = 0.2 if expected > 1e3 else 1e-3
    assert all(abs(step - expected) < tolerance for step in moved(job, model))


def test_who_is_left_out_is_named_and_not_in_the_record(model: Path, tmp_path: Path, caplog):
    job = job_with(OrderedAverage(max_norm_ratio=3), tmp_path, model)
    kind = DataKind.WEIGHT_DIFF
    replies = {"a": honest(model, 1.0, 1, kind), "b": honest(model, 1e6, 1, kind)}
    one_round(job, {**replies, "c": honest(model, 1.0, 1, kind)})
    assert "Site 'b' is left out" in caplog.text
    record = json.loads((job.run_dir / "global_model/last/federation.json").read_text())
    assert record["parents"]["sites"] == ["a", "c"]


def test_too_few_results_to_trim_end_the_job_and_say_so(model: Path, tmp_path: Path):
    job = job_with(TrimmedMean(num_trimmed=2), tmp_path, model)
    one_round(job, {site: honest(model, 1.0, 1, DataKind.WEIGHT_DIFF) for site in SITES})
    assert "more than 4 sites to trim 2 at each end, found 3" in job.panic


def test_scatter_and_gather_counts_each_site(model: Path, tmp_path: Path):
    """FLARE hands its aggregators a result without its site's name: all would be one."""
    workflow = ScatterAndGather(
        min_clients=3,
        num_rounds=1,
        persistor_id="persistor",
        wait_time_after_min_received=0,
        task_check_period=0.005,
    )
    components = {
        "persistor": SafetensorsModelPersistor(model_name_or_path=str(model)),
        "aggregator": OrderedAverage(),
        "shareable_generator": FullModelShareableGenerator(),
    }
    job = Federation(tmp_path, workflow, components)
    one_round(job, {"a": honest(model, 1.0, 3), "b": honest(model, 1.0), "c": honest(model, 5.0)})
    assert job.panic is None
    assert all(abs(value - 1.8) < 1e-6 for value in saved(job))
