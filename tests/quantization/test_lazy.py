"""A lazy value behaves as the tensor it stands for, with FLARE's own classes that do not know of it."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.filters.exclude_vars import ExcludeVars
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
from nvflare.app_common.filters.svt_privacy import SVTPrivacy
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_opt.pt.fedopt import PTFedOptModelShareableGenerator
from nvflare.fuel.utils import fobs

from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.quantization.lazy import LazyTensor
from nvflare_llm_components.quantization.message import decode_message, encode_message
from nvflare_llm_components.quantization.precision import CODECS, PrecisionPolicy
from nvflare_llm_components.quantization.shadow import advance, follow
from nvflare_llm_components.quantization.wire import WireFormatError, pack
from nvflare_llm_components.tensors.blocks import blocks_of
from nvflare_llm_components.tensors.lazy import LazyValue

ignore_numpy = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # FLARE's, on tensors


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(40, 90, generator=generator).to(dtype) * 1e-3 for name in ("embed", "layer")}


def result(lazy: bool, precision: str = "int8", kind: str = DataKind.WEIGHT_DIFF) -> Shareable:
    sent = PrecisionQuantizeFilter(precision=precision).process(
        DXO(kind, weights()).to_shareable(), FLContext()
    )
    return PrecisionDequantizeFilter(lazy=lazy).process(fobs.loads(fobs.dumps(sent)), FLContext())


def pair() -> tuple[LazyTensor, torch.Tensor]:
    lazy, eager = (from_shareable(result(lazy)).data["embed"] for lazy in (True, False))
    assert isinstance(lazy, LazyTensor)
    return lazy, eager


OPERATIONS = {
    "add": lambda x: x + 1,
    "add to": lambda x: 1.0 + x,
    "of two": lambda x: x + x,
    "tensor plus": lambda x: torch.ones(40, 90) + x,
    "plus tensor": lambda x: x + torch.ones(40, 90),
    "minus": lambda x: 2 - x,
    "scaled": lambda x: -1.0 * x,
    "divided": lambda x: x / 3,
    "compared": lambda x: (x > 0) & (x < 1e-3),
    "indexed": lambda x: x[3, 4:9],
    "negated": lambda x: abs(-x),
    "in a list": lambda x: torch.stack([x, x]),
    "by a keyword": lambda x: torch.add(input=torch.ones(40, 90), other=x, alpha=2),
    "copied into": lambda x: torch.empty(40, 90).copy_(x),
    "added into": lambda x: torch.ones(40, 90).add_(x, alpha=0.5),
    "a method": lambda x: x.to(torch.float64).sum(),
    "NumPy": lambda x: np.abs(np.asarray(x)),
    "NumPy as": lambda x: np.asarray(x, np.float64),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_each_use_gives_what_the_tensor_gives(operation):
    lazy, eager = pair()
    found, expected = operation(lazy), operation(eager)
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype
    assert (found == expected).all()
    assert isinstance(lazy, LazyTensor)


@pytest.mark.parametrize("restore", [None, torch.bfloat16, torch.float64, "source"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int2"])
def test_shape_and_dtype_are_known_without_decoding(precision, dtype, restore, monkeypatch):
    message = encode_message({"w": torch.ones(30, 50).to(dtype)}, PrecisionPolicy(precision))
    lazy = decode_message(message.values, message.header, restore, lazy=True)[0]["w"]
    eager = decode_message(message.values, message.header, restore, lazy=False)[0]["w"]
    monkeypatch.setattr(LazyTensor, "materialize", None)
    assert (lazy.shape, lazy.dtype) == (eager.shape, eager.dtype)
    if restore == "source":
        assert eager.dtype == dtype


def test_a_change_in_place_is_refused_rather_than_lost():
    lazy, _ = pair()
    with pytest.raises(AttributeError, match="has no 'add_'"):
        lazy.add_(1)
    assert not hasattr(lazy, "__setitem__")


def test_it_is_copied_and_sent_on_as_a_tensor():
    lazy, eager = pair()
    assert torch.equal(copy.deepcopy(lazy).materialize(), eager)
    shareable = DXO(DataKind.WEIGHTS, {"w": lazy, "same": lazy}).to_shareable()
    assert torch.equal(from_shareable(fobs.loads(fobs.dumps(shareable))).data["w"], eager)


def test_a_value_of_a_shadow_behaves_alike(tmp_path: Path):
    step = advance(weights(), PrecisionPolicy("int2"), tmp_path / "server")
    message = step.message_for(None)
    lazy = follow(message.values, message.header, tmp_path / "site", None, lazy=True)[0]["embed"]
    assert isinstance(lazy, LazyValue)
    assert (lazy.shape, lazy.dtype) == ((40, 90), torch.float32)
    assert torch.equal(lazy + 0, weights()["embed"].bfloat16().float())


def test_full_model_shareable_generator_adds_differences():
    found = []
    for lazy in (True, False):
        fl_ctx = FLContext()
        fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(weights(), {}))
        learnable = FullModelShareableGenerator().shareable_to_learnable(result(lazy), fl_ctx)
        found.append(learnable[ModelLearnableKey.WEIGHTS])
    for name in weights():
        assert torch.equal(found[0][name], found[1][name])


def test_fl_model_utils_add_differences():
    updates = [
        FLModel(params_type=ParamsType.DIFF, params=from_shareable(result(lazy)).data) for lazy in (1, 0)
    ]
    models = [FLModelUtils.update_model(FLModel(params=weights()), update) for update in updates]
    assert all(torch.equal(models[0].params[name], models[1].params[name]) for name in weights())


@ignore_numpy
@pytest.mark.parametrize(
    "make", [PercentilePrivacy, lambda: SVTPrivacy(fraction=0.5), lambda: ExcludeVars(["layer"])]
)
def test_flares_filters_after_ours_do_what_they_do_to_tensors(make):
    found = []
    for lazy in (True, False):
        np.random.seed(0)
        found.append(from_shareable(make().process(result(lazy), FLContext())).data)
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert np.array_equal(np.asarray(found[0][name]), np.asarray(found[1][name]))


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")  # FLARE's, of any tensor
def test_fedopt_takes_a_step_along_them():
    found = []
    for lazy in (True, False):
        generator = PTFedOptModelShareableGenerator(source_model="model")
        generator.model = torch.nn.ParameterDict({name: torch.zeros(40, 90) for name in weights()})
        generator.optimizer = torch.optim.SGD(generator.model.parameters(), lr=0.5, momentum=0.6)
        generator.optimizer_name = "SGD"
        fl_ctx = FLContext()
        fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(weights(), {}))
        learnable = generator.shareable_to_learnable(result(lazy), fl_ctx)
        found.append(learnable[ModelLearnableKey.WEIGHTS])
    assert found[0].keys() == weights().keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert found[0]["embed"].abs().sum() > 0


def test_what_is_not_finite_is_told_without_decoding(monkeypatch):
    broken = {"w": torch.full((40, 40), 1.0)}
    broken["w"][0, 0] = math.nan
    for precision in ("int8", "nf4", "int2", "bf16"):
        message = encode_message(broken, PrecisionPolicy(precision))
        lazy = decode_message(message.values, message.header, None, lazy=True)[0]["w"]
        with monkeypatch.context() as patch:
            patch.setattr(LazyTensor, "materialize", None)
            assert lazy.has_nonfinite


def test_an_empty_tensor_has_as_many_blocks_however_it_is_sent():
    empty = torch.zeros(0, 4)
    payload, entry, _ = pack("w", empty, CODECS["int8"], None)
    sent = LazyTensor(payload, entry, None)
    assert [block.numel() for block in sent.blocks()] == [block.numel() for block in blocks_of(empty)] == [0]


def test_a_step_of_another_size_than_its_shadow_is_refused(tmp_path: Path):
    policy, folders = PrecisionPolicy("int2", None, {}), [tmp_path / "server", tmp_path / "site"]
    for folder in folders:
        folder.mkdir()
    first = advance({"w": torch.ones(64, 64)}, policy, folders[0])
    whole = first.message_for(None)
    follow(whole.values, whole.header, folders[1], None, True)
    step = advance({"w": torch.zeros(64, 64)}, policy, folders[0]).message_for(first.new)
    payload, entry, _ = pack("w", torch.ones(32, 64), CODECS["int2"], None, {"shadow": True})
    header = {**step.header, "params": {"w": entry}}
    with pytest.raises(WireFormatError, match=r"a step of \(64, 64\)"):
        follow({"w": payload}, header, folders[1], None, True)
