"""One hostile site among two honest ones: nothing of a forged result is in an average, and its site is named.

Each forgery goes through FLARE's own runner into each controller; in one job the hostile site answers every
round with another one, first in even rounds and last in odd ones.
"""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import (
    InTimeAccumulateWeightedAggregator,
)
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
from nvflare.app_common.widgets.intime_model_selector import IntimeModelSelector
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from nvflare_llm_components.aggregators import OrderedAverage
from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.flare.gate import KIND_ARGUMENTS
from nvflare_llm_components.flare.headers import ERROR_HEADER, WIRE_MARKER
from nvflare_llm_components.persistors import SafetensorsModelPersistor
from nvflare_llm_components.workflows import QuorumFedAvg
from tests.federation import Federation
from tests.tasks import weights_of
from tests.tiny import save_tiny_model

NORM = "model.norm.weight"
HOSTILE, SITES = "b", ("a", "b", "c")
STEPS, METRICS = MetaKey.NUM_STEPS_CURRENT_ROUND, MetaKey.INITIAL_METRICS
LOOK = {"task_check_period": 0.005}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def honest(model: Path, value: float, weight: float = 1, kind: str = DataKind.WEIGHTS) -> Shareable:
    data = {name: torch.full_like(tensor, value) for name, tensor in weights_of(model).items()}
    metrics = {"eval_loss": 2.0, "train_loss": 1.0}
    return DXO(kind, data, {STEPS: weight, METRICS: metrics}).to_shareable()


def changing(change: Callable[[DXO], Any]) -> Callable[[Shareable], Shareable]:
    """A forgery that is an honest result but for one change."""

    def forge(result: Shareable) -> Shareable:
        dxo = from_shareable(result)
        change(dxo)
        return dxo.update_shareable(result)

    return forge


def tensors(**values: Any) -> Callable[[Shareable], Shareable]:
    return changing(
        lambda dxo: dxo.data.update({name.replace("norm", NORM): v for name, v in values.items()})
    )


def meta(**values: Any) -> Callable[[Shareable], Shareable]:
    return changing(lambda dxo: dxo.meta.update(values))


def metrics(value: Any) -> Callable[[Shareable], Shareable]:
    return meta(**{METRICS: value})


def kind(name: str) -> Callable[[Shareable], Shareable]:
    return changing(lambda dxo: setattr(dxo, "data_kind", str(getattr(name, "value", name))))


def without_content(result: Shareable) -> Shareable:
    return make_reply(ReturnCode.OK)


def with_code(code: Any) -> Callable[[Shareable], Shareable]:
    def forge(result: Shareable) -> Shareable:
        result.set_return_code(code)
        return result

    return forge


def with_header(key: str, value: Any) -> Callable[[Shareable], Shareable]:
    def forge(result: Shareable) -> Shareable:
        result.set_header(key, value)
        return result

    return forge


def with_reason(reason: Any) -> Callable[[Shareable], Shareable]:
    return lambda result: with_header(ERROR_HEADER, reason)(with_code(ReturnCode.EXECUTION_EXCEPTION)(result))


def kind_array(result: Shareable) -> Shareable:
    result["DXO"]["kind"] = np.array(["WEIGHTS", "WEIGHTS"])
    return result


def broken_container(result: Shareable) -> Shareable:
    result["DXO"] = [1, 2, 3]
    return result


class Bomb:
    """A lazy value that must not be decoded: it says how large it is."""

    shape = (1 << 40,)

    def materialize(self) -> torch.Tensor:
        raise AssertionError("decoded")


class Failing:
    def materialize(self) -> torch.Tensor:
        raise RecursionError("maximum recursion depth exceeded")


NESTED: Any = {}
for _ in range(5000):
    NESTED = {"x": NESTED}

FORGERIES: dict[str, tuple[Callable[[Shareable], Shareable], str]] = {
    "another shape": (tensors(norm=torch.ones(31)), r"shape \(32,\), found \(31,\)"),
    "a shape that broadcasts": (tensors(norm=torch.ones(1)), r"shape \(32,\), found \(1,\)"),
    "a shape of more dimensions": (tensors(norm=torch.ones(1, 32)), r"shape \(32,\), found \(1, 32\)"),
    "integers": (tensors(norm=torch.ones(32, dtype=torch.int64)), "in torch.float32, found torch.int64"),
    "bools": (tensors(norm=torch.ones(32, dtype=torch.bool)), "found torch.bool"),
    "complex": (tensors(norm=torch.ones(32, dtype=torch.complex64)), "found torch.complex64"),
    "8 bit floats": (tensors(norm=torch.ones(32).to(torch.float8_e5m2)), "found torch.float8_e5m2"),
    "objects": (tensors(norm=np.array([None] * 32)), "to be a tensor, found ndarray"),
    "text": (tensors(norm="x" * 32), "to be a tensor, found str"),
    "a list": (tensors(norm=[1.0] * 32), "to be a tensor, found list"),
    "a bomb": (tensors(norm=Bomb()), r"found \(1099511627776,\)"),
    "one that fails": (tensors(norm=Failing()), r"cannot be read \(RecursionError\)"),
    "NaN": (tensors(norm=torch.full((32,), torch.nan)), f"NaN or Inf in {NORM}: 32 of 32"),
    "one infinity": (tensors(norm=torch.tensor([1.0] * 31 + [torch.inf])), f"NaN or Inf in {NORM}: 1 of 32"),
    "3e38": (tensors(norm=torch.full((32,), -3e38)), r"found -3e\+38"),
    "a missing name": (changing(lambda dxo: dxo.data.pop(NORM)), rf"1 missing \({NORM}\)"),
    "a surplus name": (tensors(evil=torch.ones(2)), r"1 unknown \(evil\)"),
    "a name to forge a log": (tensors(**{"x\nERROR b": torch.ones(2)}), r"unknown \(x\\nERROR b\)"),
    "a code that is one OK in an array": (with_code(np.array(["OK"])), "EXECUTION_RESULT_ERROR"),
    "a reason that is an array": (with_reason(np.array([1, 2])), r"EXECUTION_EXCEPTION. \[1 2\]"),
    "a type of content that is an array": (
        with_header(ReservedHeaderKey.CONTENT_TYPE, np.arange(2)),
        "cannot",
    ),
    "a weight that is an array": (meta(**{STEPS: np.array([1.0, 2.0])}), "expected a weight above 0"),
    "a metric that is an array": (metrics({"eval_loss": np.array([1.0, 2.0])}), "expected metric"),
    "metrics that are an array": (metrics(np.array([1.0, 2.0])), "expected up to 64 metrics"),
    "a marker that is an array": (meta(**{WIRE_MARKER: np.array([1.0, 2.0])}), "still encoded"),
    "a kind that is an array": (kind_array, "cannot be read|expected data kind"),
    "no tensors": (changing(lambda dxo: dxo.data.clear()), "missing"),
    "differences": (kind(DataKind.WEIGHT_DIFF), "kind WEIGHTS, found 'WEIGHT_DIFF'"),
    "a collection": (kind(DataKind.COLLECTION), "found 'COLLECTION'"),
    "metrics": (kind(DataKind.METRICS), "found 'METRICS'"),
    "an unknown kind": (kind("x\ny"), r"found 'x\\ny'"),
    "a negative weight": (meta(**{STEPS: -9.99}), "found -9.99"),
    "a weight of 0": (meta(**{STEPS: 0}), "found 0"),
    "a weight of 1e30": (meta(**{STEPS: 1e30}), r"up to 1e\+09 in the average, found 1e\+30"),
    "a weight that is NaN": (meta(**{STEPS: float("nan")}), "found nan"),
    "a weight in words": (meta(**{STEPS: "many"}), "found 'many'"),
    "a weight of 10**400": (meta(**{STEPS: 10**400}), "found 1000"),
    "a bool as weight": (meta(**{STEPS: True}), "found True"),
    "a list as weight": (meta(**{STEPS: [1]}), r"found \[1\]"),
    "a loss of -1e30": (metrics({"eval_loss": -1e30}), r"from 0 to 10000, found -1e\+30"),
    "a loss that is NaN": (metrics({"eval_loss": float("nan")}), "found nan"),
    "a list as metric": (metrics({"eval_loss": [1.0]}), r"found \[1.0\]"),
    "a dict as metric": (metrics({"eval_loss": {}}), "found {}"),
    "text as metric": (metrics({"accuracy": "high"}), "found 'high'"),
    "metrics in a list": (metrics([1.0]), "metrics by name, found list"),
    "1000 metrics": (metrics({f"m{i}": 1.0 for i in range(1000)}), "up to 64 metrics by name, found 1000"),
    "a long name": (metrics({"m" * 1000: 1.0}), "of up to 100 characters"),
    "nested metrics": (metrics({"accuracy": NESTED}), r"cannot be read \(RecursionError\)"),
    "still encoded": (meta(**{WIRE_MARKER: {"version": 1}}), "still encoded"),
    "no content": (without_content, "expected weights, found none"),
    "broken content": (broken_container, "cannot be read"),
    "an empty return code": (with_code(""), "Result of site 'b' for task 'train': EXECUTION_RESULT_ERROR"),
    "a return code in words": (
        with_code("fine\nERROR"),
        "Result of site 'b' for task 'train': EXECUTION_RESULT_ERROR",
    ),
    "a list as return code": (
        with_code(["OK"]),
        "Result of site 'b' for task 'train': EXECUTION_RESULT_ERROR",
    ),
}

CONTROLLERS: dict[str, Callable[[int], tuple[Controller, dict[str, FLComponent]]]] = {
    "FedAvg": lambda n: (FedAvg(num_clients=3, num_rounds=n, ignore_result_error=True, **LOOK), {}),
    "OrderedAverage": lambda n: (
        FedAvg(num_clients=3, num_rounds=n, ignore_result_error=True, aggregator=OrderedAverage(), **LOOK),
        {},
    ),
    "QuorumFedAvg": lambda n: (QuorumFedAvg(num_clients=3, num_rounds=n, quorum=2, grace_s=600, **LOOK), {}),
    "ScatterAndGather": lambda n: (
        ScatterAndGather(
            min_clients=3,
            persistor_id="persistor",
            num_rounds=n,
            wait_time_after_min_received=0,
            ignore_result_error=True,
            task_check_period=0.005,
        ),
        {
            "aggregator": InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS),
            "shareable_generator": FullModelShareableGenerator(),
        },
    ),
}


def federation(folder: Path, model: Path, controller: str, num_rounds: int, **settings: Any) -> Federation:
    workflow, components = CONTROLLERS[controller](num_rounds)
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model), keep=["last", "every 1"], **settings)
    return Federation(folder, workflow, {"persistor": persistor, **components})


def saved(job: Federation, name: str = "last") -> set[float]:
    values = weights_of(job.run_dir / "global_model" / name).values()
    return {float(value) for tensor in values for value in tensor.unique()}


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "is refused:" in r.getMessage()]


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_forged_result_costs_its_site_the_round_and_leaves_nothing(
    controller: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    job = federation(tmp_path, model, controller, len(FORGERIES)).start()
    told = []
    for number, (forge, _) in enumerate(FORGERIES.values()):
        replies = [("a", honest(model, number + 1.0, 3)), ("c", honest(model, number + 5.0, 1))]
        replies.insert(0 if number % 2 == 0 else 2, (HOSTILE, forge(honest(model, 1e6, 1000))))
        for site in SITES:
            job.ask(site)
        caplog.clear()
        for site, reply in replies:
            job.answer(site, reply)
        told.append([r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR])
    job.end()
    assert job.panic is None
    for number, (name, (_, reason)) in enumerate(FORGERIES.items()):
        assert saved(job, f"round_{number}") == {number + 2.0}, name
        sentences = " | ".join(told[number])
        assert re.search(reason, sentences), (name, sentences)
        assert not re.search("site '[ac]'", sentences), (name, sentences)
        assert "\n" not in sentences, name


@pytest.mark.parametrize("name", ["another shape", "NaN", "a weight of 1e30", "differences", "still encoded"])
def test_where_the_job_needs_all_sites_it_ends_with_the_hostile_ones_name(
    name: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    job = Federation(tmp_path, FedAvg(num_clients=3, num_rounds=1, **LOOK), {"persistor": persistor}).start()
    for site in SITES:
        job.ask(site)
    forge, reason = FORGERIES[name]
    job.answer(HOSTILE, forge(honest(model, 1.0)))
    job.end()
    assert "from b" in job.panic
    assert "TASK_RESULT_FILTER_ERROR" in job.panic
    (told,) = refusals(caplog)
    assert "Round 0: the result of site 'b'" in told
    assert re.search(reason, told)
    assert not (job.run_dir / "global_model" / "last").exists()


def test_a_quorum_out_of_reach_tells_what_was_refused(model: Path, tmp_path: Path):
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    job = Federation(tmp_path, QuorumFedAvg(num_clients=3, num_rounds=1, **LOOK), {"persistor": persistor})
    job.start()
    for site in SITES:
        job.ask(site)
    job.answer(HOSTILE, FORGERIES["NaN"][0](honest(model, 1.0)))
    job.end()
    assert f"NaN or Inf in {NORM}" in job.panic
    assert "'a'" not in job.panic


def test_where_all_are_refused_the_model_is_not_replaced_and_all_reasons_are_told(
    model: Path, tmp_path: Path
):
    job = federation(tmp_path, model, "OrderedAverage", 1).start()
    for site in SITES:
        job.ask(site)
    for site in SITES:
        job.answer(site, FORGERIES["still encoded"][0](honest(model, 1.0)))
    job.end()
    assert "at least one site, found none" in job.panic


def one_round(job: Federation, replies: dict[str, Shareable]) -> Federation:
    job.start()
    for site in SITES:
        job.ask(site)
    for site, reply in replies.items():
        job.answer(site, reply)
    job.end()
    return job


def test_a_forged_loss_reaches_no_model_selector(model: Path, tmp_path: Path):
    """FLARE's selector looks at every reply before its return code is looked at."""
    selector = IntimeModelSelector(key_metric="eval_loss", negate_key_metric=True)
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = FedAvg(num_clients=3, num_rounds=2, ignore_result_error=True, **LOOK)
    job = Federation(tmp_path, workflow, {"persistor": persistor, "selector": selector}).start()
    for _ in range(2):
        for site in SITES:
            job.ask(site)
        job.answer(HOSTILE, FORGERIES["a loss of -1e30"][0](honest(model, 1.0)))
        job.answer("a", honest(model, 1.0))
        job.answer("c", honest(model, 1.0))
    job.end()
    assert selector.best_raw_val_metric == 2.0


class FailingFilter(PrecisionDequantizeFilter):
    """A result filter of FLARE's contract that fails: the runner then makes another reply of it."""

    def process(self, shareable: Shareable, fl_ctx: Any) -> Shareable:
        raise ValueError("cannot be decoded")


def test_nor_does_that_of_a_reply_that_filters_have_replaced(model: Path, tmp_path: Path):
    selector = IntimeModelSelector(key_metric="eval_loss", negate_key_metric=True)
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = FedAvg(num_clients=3, num_rounds=2, start_round=1, ignore_result_error=True, **LOOK)
    components = {"persistor": persistor, "selector": selector}
    job = Federation(tmp_path, workflow, components, result_filters=[FailingFilter()]).start()
    for site in SITES:
        job.ask(site)
    for site in SITES:
        job.answer(site, honest(model, 1.0))
    job.end()
    assert selector.validation_metric_sum_of_weights == 0
    assert selector.best_raw_val_metric is None


def test_orders_in_the_meta_are_left_out(model: Path, tmp_path: Path):
    """FLARE's generators refuse a whole round where one site says its data were processed."""
    processed = meta(PROCESSED_ALGORITHM="HE", secret="x")(honest(model, 3.0))
    job = one_round(
        federation(tmp_path, model, "ScatterAndGather", 1),
        {HOSTILE: processed, "a": honest(model, 3.0), "c": honest(model, 3.0)},
    )
    assert job.panic is None
    assert saved(job) == {3.0}


@pytest.mark.parametrize("params_type", ["FULL", "DIFF"])
@pytest.mark.parametrize("path", KIND_ARGUMENTS)
def test_the_kind_is_what_the_jobs_executor_is_told(path: str, params_type: str, model: Path, tmp_path: Path):
    executor = {"path": path, "args": {KIND_ARGUMENTS[path]: "{params_type}"}}
    others = [{"path": other, "args": {}} for other in KIND_ARGUMENTS]  # by default they send weights
    entries = [
        {"tasks": [task], "executor": each} for task, each in zip(["tra", "val*"], others, strict=True)
    ]
    entries.insert(1, {"tasks": ["tr*"], "executor": executor})
    config = {"params_type": params_type, "executors": entries}
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = FedAvg(num_clients=3, num_rounds=1, ignore_result_error=True, **LOOK)
    job = Federation(tmp_path, workflow, {"persistor": persistor}, client_config=json.dumps(config))
    kinds = {"FULL": DataKind.WEIGHTS, "DIFF": DataKind.WEIGHT_DIFF}
    right = kinds.pop(params_type)
    (wrong,) = kinds.values()
    one_round(job, {s: honest(model, 1.0, kind=wrong if s == HOSTILE else right) for s in "bac"})
    assert job.panic is None
    found, start = weights_of(job.run_dir / "global_model/last"), weights_of(model)
    for name, value in start.items():
        assert torch.equal(found[name], value + 1 if params_type == "DIFF" else torch.ones_like(value))


def test_the_jobs_own_settings_come_first(model: Path, tmp_path: Path):
    results = {"data_kind": "WEIGHT_DIFF", "max_weight": 10, "equal_weights": False}
    job = federation(tmp_path, model, "OrderedAverage", 1, results=results)
    diff = DataKind.WEIGHT_DIFF
    replies = {HOSTILE: honest(model, 9.0, 11, diff), "a": honest(model, 1.0, 3, diff)}
    one_round(job, replies | {"c": honest(model, 5.0, 1, diff)})
    start = weights_of(model)
    assert all(torch.equal(v, start[n] + 2) for n, v in weights_of(job.run_dir / "global_model/last").items())


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_with_equal_weights_no_site_says_what_it_counts(controller: str, model: Path, tmp_path: Path):
    job = federation(tmp_path, model, controller, 1, results={"equal_weights": True})
    replies = {HOSTILE: honest(model, 1.0, 10**400), "a": honest(model, 2.0, -1), "c": honest(model, 6.0, 3)}  # type: ignore[arg-type]
    assert saved(one_round(job, replies)) == {3.0}


@pytest.mark.parametrize(
    "results", [{"max_weight": -1}, {"data_kind": "ANY"}, {"max_wait": 1}, {"also_meta": "x"}]
)
def test_a_setting_that_cannot_be_ends_the_job_before_its_first_round(
    results: dict, model: Path, tmp_path: Path
):
    job = federation(tmp_path, model, "FedAvg", 1, results=results).start()
    job.end()
    assert "results." in job.panic


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_first_results_dtype_is_not_that_of_the_sum(dtype: torch.dtype, model: Path, tmp_path: Path):
    """FLARE sums in it: 70,000 examples times 1.0 are infinite in float16."""
    narrow = changing(lambda dxo: dxo.data.update({n: v.to(dtype) for n, v in dxo.data.items()}))
    job = federation(tmp_path, model, "FedAvg", 1)
    replies = {HOSTILE: narrow(honest(model, 1.0, 70_000)), "a": honest(model, 1.0), "c": honest(model, 1.0)}
    one_round(job, replies)
    assert job.panic is None
    assert {v.dtype for v in weights_of(job.run_dir / "global_model/last").values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "nf4"])
def test_what_is_encoded_is_checked_as_well(precision: str, model: Path, tmp_path: Path, caplog):
    """A lazy value's NaN, and its size, are seen without the whole result in memory."""
    encode = PrecisionQuantizeFilter(precision=precision)
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = FedAvg(num_clients=3, num_rounds=1, ignore_result_error=True, **LOOK)
    job = Federation(
        tmp_path, workflow, {"persistor": persistor}, result_filters=[PrecisionDequantizeFilter()]
    )
    bad = FORGERIES["one infinity"][0](honest(model, 1.0))
    replies = {HOSTILE: bad, "a": honest(model, 2.0, 3), "c": honest(model, 2.0)}
    context = job.new_context()
    one_round(job, {site: encode.process(reply, context) for site, reply in replies.items()})
    (told,) = refusals(caplog)
    assert f"NaN or Inf in {NORM}: 1 of 32" in told
    assert "site 'b'" in told
    assert all(abs(value - 2.0) < 0.02 for value in saved(job))


def test_what_cannot_be_decoded_is_refused_with_site_and_reason(model: Path, tmp_path: Path, caplog):
    """FLARE makes a bare return code of what a filter raises."""
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = QuorumFedAvg(num_clients=3, num_rounds=1, **LOOK)
    filters = [PrecisionDequantizeFilter()]
    job = Federation(tmp_path, workflow, {"persistor": persistor}, result_filters=filters).start()
    for site in SITES:
        job.ask(site)
    sent = PrecisionQuantizeFilter(precision="int8").process(honest(model, 1.0), job.new_context())
    from_shareable(sent).data[NORM] += 1
    job.answer(HOSTILE, sent)
    job.end()
    reason = f"Parameter '{NORM}' of the message is refused: its checksum"
    assert f"Site 'b' failed: {reason}" in job.panic
    assert f"Result of site 'b' for task 'train': TASK_RESULT_FILTER_ERROR. {reason}" in caplog.text


def test_a_site_cannot_blame_another_one(model: Path, tmp_path: Path, caplog):
    claim = {ERROR_HEADER: "Task 'train' failed at site 'a': out of memory"}
    failure = make_reply(ReturnCode.EXECUTION_EXCEPTION, headers=claim)
    job = federation(tmp_path, model, "FedAvg", 1)
    one_round(job, {HOSTILE: failure, "a": honest(model, 2.0), "c": honest(model, 2.0)})
    assert "Result of site 'b' for task 'train': EXECUTION_EXCEPTION. Task 'train' failed at" in caplog.text


def test_a_failed_sites_reason_cannot_forge_a_line(model: Path, tmp_path: Path, caplog):
    reason = "no rows\n2026-01-01 - ERROR - site 'a' is refused" + "x" * 10_000
    failure = make_reply(ReturnCode.EXECUTION_EXCEPTION, headers={ERROR_HEADER: reason})
    job = federation(tmp_path, model, "FedAvg", 1)
    one_round(job, {HOSTILE: failure, "a": honest(model, 2.0), "c": honest(model, 2.0)})
    (told,) = [r.getMessage() for r in caplog.records if "no rows" in r.getMessage()]
    assert "\n" not in told
    assert len(told) < 2000


def test_nothing_else_of_a_result_is_passed_on(model: Path, tmp_path: Path):
    job = federation(tmp_path, model, "FedAvg", 1)
    surplus = honest(model, 2.0)
    surplus["extra"] = "x" * 100
    one_round(job, {HOSTILE: surplus, "a": honest(model, 2.0), "c": honest(model, 2.0)})
    assert set(surplus) == {ReservedHeaderKey.HEADERS, "DXO"}
