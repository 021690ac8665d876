"""What FLARE's own aggregation makes of dequantized results, in memory and offloaded to disk."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict
from safetensors.torch import save_file

from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.quantization.lazy import LazyTensor

PRECISIONS = ["fp16", "bf16", "int8", "nf4", "int2"]


def result(weights: torch.Tensor, precision: str) -> DXO:
    shareable = DXO(DataKind.WEIGHT_DIFF, {"w": weights}).to_shareable()
    return from_shareable(PrecisionQuantizeFilter(precision=precision).process(shareable, FLContext()))


def arrived(dxo: DXO, lazy: bool = True) -> dict:
    shareable = dxo.to_shareable()
    return from_shareable(PrecisionDequantizeFilter(lazy=lazy).process(shareable, FLContext())).data


@settings(max_examples=60, deadline=None)
@given(
    clients=st.lists(
        st.tuples(st.sampled_from(PRECISIONS), st.integers(1, 2_000_000)), min_size=2, max_size=64
    ),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    lazy=st.booleans(),
)
def test_the_mean_of_any_mix_of_precisions_is_that_of_what_was_decoded(clients, scale, lazy):
    helper = WeightedAggregationHelper()
    exact, total = torch.zeros(20, 33, dtype=torch.float64), 0
    for index, (precision, num_tokens) in enumerate(clients):
        generator = torch.Generator().manual_seed(index)
        dxo = result(torch.randn(20, 33, generator=generator) * scale, precision)
        exact += num_tokens * arrived(dxo, lazy=False)["w"].double()
        total += num_tokens
        helper.add(arrived(dxo, lazy), num_tokens, f"site-{index}", 0)
    mean = helper.get_result()["w"]
    assert mean.dtype == torch.float32
    assert float((mean.double() - exact / total).abs().max()) <= 1e-6 * max(1.0, scale * 4)


def test_waiting_results_cost_their_quantized_size():
    dxo = result(torch.randn(256, 256), "nf4")
    waiting = arrived(dxo)["w"]
    assert isinstance(waiting, LazyTensor)
    assert waiting._value is dxo.data["w"]
    assert dxo.data["w"].numel() < 256 * 256 * 0.52


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
def test_a_waiting_result_knows_that_it_is_not_finite(precision, bad, monkeypatch):
    good, broken = torch.full((40, 40), 1e6), torch.full((40, 40), 1e6)
    broken[3, 4] = bad
    monkeypatch.setattr(LazyTensor, "materialize", None)  # nothing is decoded for it
    found = [arrived(result(weights, precision))["w"].has_nonfinite for weights in (good, broken)]
    assert found == [False, True]


def offloaded(dxo: DXO, folder: Path) -> DXO:
    """The message as FLARE's disk offload delivers it: a lazy reference to a file for each tensor."""
    folder.mkdir()
    save_file({"t": dxo.data["w"]}, folder / "w.safetensors")
    lazy = LazyTensorDict({"w": (str(folder / "w.safetensors"), "t")}, str(folder))
    return DXO(dxo.data_kind, {"w": lazy.make_lazy_ref("w")}, dxo.meta)


@pytest.mark.parametrize(("precision", "is_told"), [("int8", True), ("fp16", False)])
def test_a_result_on_disk_is_not_read_to_know_that_it_is_not_finite(precision, is_told, tmp_path):
    broken = torch.full((40, 40), torch.inf)
    waiting = arrived(offloaded(result(broken, precision), tmp_path / "offloaded"))["w"]
    (tmp_path / "offloaded/w.safetensors").unlink()
    assert waiting.has_nonfinite is is_told


def test_results_on_disk_are_averaged_from_disk(tmp_path):
    helper = WeightedAggregationHelper()
    for index, precision in enumerate(PRECISIONS):
        dxo = offloaded(result(torch.full((8, 40), float(index)), precision), tmp_path / precision)
        lazy = arrived(dxo)
        del dxo
        assert (tmp_path / precision).exists()
        helper.add(lazy, 1.0, precision, 0)
        del lazy
    assert torch.allclose(helper.get_result()["w"], torch.tensor(2.0), atol=0.02)
    assert not any((tmp_path / precision).exists() for precision in PRECISIONS)


def test_a_result_on_disk_that_was_tampered_with_is_refused_before_it_is_averaged(tmp_path):
    dxo = result(torch.ones(8, 40), "int8")
    tampered = dxo.data["w"].clone()
    tampered[-1] ^= 1
    lazy = offloaded(DXO(dxo.data_kind, {"w": tampered}, dxo.meta), tmp_path / "w")
    with pytest.raises(ValueError, match="checksum"):
        arrived(lazy)
