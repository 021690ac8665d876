"""A result is made as it is read only where our own filter is the first to read it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.signal import Signal
from nvflare.app_common.filters.exclude_vars import ExcludeVars
from nvflare.private.privacy_manager import Scope

from nvflare_llm_components.executors import HFSFTExecutor
from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.flare.chain import first_result_filter
from nvflare_llm_components.tensors.lazy import LazyValue
from tests.tasks import result, task, weights_of


class Noise(DXOFilter):
    """A site's own filter, written for tensors: in place."""

    def __init__(self) -> None:
        super().__init__([DataKind.WEIGHTS, DataKind.WEIGHT_DIFF], [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])

    def process_dxo(self, dxo, shareable, fl_ctx):
        for value in dxo.data.values():
            assert isinstance(value, torch.Tensor)
            value += 1
        return dxo


class Own(PrecisionQuantizeFilter):
    """One that does more than ours, of which nobody knows what."""


QUANTIZE = PrecisionQuantizeFilter(precision="int8")


def chain(
    fl_ctx: Any, of_job: list[Any], of_site: list[Any], task_name: str = "train", sticky: bool = False
) -> None:
    scope = Scope()
    for each in of_site:
        scope.add_task_result_filter(each, "out")
    runner = SimpleNamespace(task_result_filters={f"{task_name}/out": of_job})
    fl_ctx.set_prop(FLContextKey.RUNNER, runner, private=True, sticky=False)
    fl_ctx.set_prop(FLContextKey.SCOPE_OBJECT, scope, private=True, sticky=False)
    fl_ctx.set_prop(FLContextKey.TASK_NAME, task_name, private=True, sticky=sticky)


@pytest.mark.parametrize("params_type", ["FULL", "DIFF"])
def test_what_our_filter_reads_first_has_the_bytes_of_tensors(params_type, make, model, fl_ctx):
    sent = []
    for of_job in ([QUANTIZE], []):
        chain(fl_ctx, of_job, [])
        reply = make(params_type=params_type).execute("train", task(weights_of(model)), fl_ctx, Signal())
        values = result(reply).data.values()
        assert all(isinstance(value, LazyValue if of_job else torch.Tensor) for value in values)
        sent.append(from_shareable(QUANTIZE.process(reply, fl_ctx)).data)
    assert sent[0].keys() == sent[1].keys()
    for name, value in sent[0].items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, sent[1][name])


@pytest.mark.parametrize("params_type", ["FULL", "DIFF"])
@pytest.mark.parametrize(
    ("of_job", "of_site"),
    [
        ([QUANTIZE], [Noise()]),
        ([ExcludeVars(["nothing"]), QUANTIZE], []),
        ([Own(precision="int8")], []),
        ([], []),
    ],
    ids=["the site's", "the job's", "a class of ours made another", "none"],
)
def test_any_other_filter_gets_tensors(of_job, of_site, params_type, make, model, fl_ctx):
    chain(fl_ctx, of_job, of_site)
    reply = make(params_type=params_type).execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert all(type(value) is torch.Tensor for value in result(reply).data.values())


def test_noise_that_a_sites_filter_adds_in_place_is_in_what_leaves(make, model, fl_ctx):
    chain(fl_ctx, [QUANTIZE], [noise := Noise()])
    reply = make(params_type="DIFF").execute("train", task(weights_of(model)), fl_ctx, Signal())
    change = {name: value.clone() for name, value in result(reply).data.items()}
    sent = QUANTIZE.process(noise.process(reply, fl_ctx), fl_ctx)
    arrived = from_shareable(PrecisionDequantizeFilter().process(sent, fl_ctx)).data
    for name, value in change.items():
        assert torch.allclose(arrived[name], value + 1, atol=0.02)


def test_what_another_task_of_the_site_asks_for_is_tensors(make, model, fl_ctx):
    chain(fl_ctx, [QUANTIZE], [], "swarm_learn")
    reply = make().execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert all(type(value) is torch.Tensor for value in result(reply).data.values())


@pytest.mark.parametrize("sticky", [False, True])
def test_a_task_that_was_names_no_filter(sticky: bool, fl_ctx):
    chain(fl_ctx, [QUANTIZE], [], sticky=sticky)
    found = first_result_filter("train", fl_ctx)
    assert found == ("" if sticky else "nvflare_llm_components.filters.PrecisionQuantizeFilter")


def test_an_executor_made_of_ours_sends_tensors(make, model, fl_ctx):
    class Made(HFSFTExecutor):
        pass

    chain(fl_ctx, [QUANTIZE], [])
    executor = make()
    executor.__class__ = Made
    reply = executor.execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert all(type(value) is torch.Tensor for value in result(reply).data.values())
