"""What a server accepts of a result: everything honest, as it is, and nothing else."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.policy.results import (
    MAX_MAGNITUDE,
    MAX_WEIGHT,
    ExpectedTensors,
    ResultRules,
    checked_meta,
    checked_metrics,
    checked_tensors,
    checked_weight,
)
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.tensors.lazy import Deferred, LazyValue

SPECS = {"w": ((2, 3), torch.float32), "half": ((4,), torch.bfloat16), "ids": ((2,), torch.int64)}
EXPECTED = ExpectedTensors(SPECS, {"head": "w"})
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def sound() -> dict[str, Any]:
    return {"half": torch.ones(4, dtype=torch.bfloat16), "w": torch.rand(2, 3), "ids": torch.tensor([1, 2])}


class Lazy:
    def __init__(self, value: torch.Tensor):
        self.value = value

    def materialize(self) -> torch.Tensor:
        return self.value


def test_what_is_sound_passes_as_it_is_in_the_models_order():
    values = sound()
    found = checked_tensors(values, EXPECTED)
    assert list(found) == list(SPECS)
    assert found["w"] is values["w"]
    assert found["ids"] is values["ids"]
    assert found["half"].dtype == torch.float32
    assert torch.equal(found["half"], torch.ones(4))
    assert checked_tensors(values, EXPECTED, is_summed=False)["half"] is values["half"]


def test_what_waits_in_a_file_is_widened_when_it_is_read(tmp_path: Path):
    """It waits there so as to take no memory."""
    (tmp_path / "values").write_bytes(b"\x80\x3f" * 4)
    half = torch.from_file(str(tmp_path / "values"), shared=True, size=4, dtype=torch.bfloat16)
    found = checked_tensors(sound() | {"half": half}, EXPECTED)["half"]
    assert isinstance(found, LazyValue)
    assert found.dtype == torch.float32
    assert [block.tolist() for block in found.blocks()] == [[1.0] * 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "container", [lambda v: v, Lazy, lambda v: v.numpy()], ids=["torch", "lazy", "numpy"]
)
def test_a_sum_is_in_float32_whatever_a_site_sends(dtype: torch.dtype, container: Any):
    if container is not Lazy and dtype == torch.bfloat16 and container(torch.ones(1)).__class__ is np.ndarray:
        pytest.skip("NumPy has no bfloat16")
    value = container(torch.full((2, 3), 0.5, dtype=dtype))
    found = checked_tensors({**sound(), "w": value}, EXPECTED)["w"]
    decoded = found.materialize() if hasattr(found, "materialize") else torch.as_tensor(found)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, torch.full((2, 3), 0.5))
    assert isinstance(found, np.ndarray) == isinstance(value, np.ndarray)
    assert hasattr(found, "materialize") == hasattr(value, "materialize")


@given(value=ANYTHING)
@settings(max_examples=300, deadline=None)
def test_no_other_object_is_a_tensor(value: object):
    with pytest.raises(PolicyError):
        checked_tensors({**sound(), "w": value}, EXPECTED)


@given(
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    dtype=st.sampled_from(
        [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]
    ),
    lazy=st.booleans(),
    fill=st.sampled_from([0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e8, 2e9, 3e38]),
)
@settings(max_examples=300, deadline=None)
def test_a_tensor_passes_if_shape_kind_and_values_are_right_and_only_then(shape, dtype, lazy, fill):
    integral = not dtype.is_floating_point and not dtype.is_complex
    value = torch.full(shape, 1 if integral else fill).to(dtype)
    right = shape == (2, 3) and dtype.is_floating_point
    right = right and bool((value.double().abs() <= MAX_MAGNITUDE).all())
    try:
        checked_tensors({**sound(), "w": Lazy(value) if lazy else value}, EXPECTED)
    except PolicyError:
        assert not right
    else:
        assert right


@given(weight=ANYTHING | st.floats(1e-6, 1e9) | st.integers(1, 10**9))
@settings(max_examples=300)
def test_a_weight_is_a_finite_number_above_zero_and_below_the_cap_as_it_is(weight: Any):
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if is_number and 0 < weight <= MAX_WEIGHT:
        assert checked_weight(weight, MAX_WEIGHT) is weight
    else:
        with pytest.raises(PolicyError, match="weight above 0 and up to 1e"):
            checked_weight(weight, MAX_WEIGHT)


@given(metrics=st.dictionaries(st.text(max_size=120), ANYTHING, max_size=4) | ANYTHING)
@settings(max_examples=300)
def test_metrics_come_out_as_finite_floats_with_printable_names_or_not_at_all(metrics: Any):
    try:
        found = checked_metrics(metrics)
    except PolicyError:
        return
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert all(name.isprintable() and 0 < len(name) <= 100 for name in found)
    assert found == {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("loss", [-1e-9, 10001, -1e30])
def test_a_loss_is_not_negative_and_not_beyond_belief(loss: float):
    assert checked_metrics({"accuracy_gain": -1.0, "eval_loss": 3.0}) == {
        "accuracy_gain": -1.0,
        "eval_loss": 3.0,
    }
    with pytest.raises(PolicyError, match="eval_loss"):
        checked_metrics({"eval_loss": loss})


def test_only_listed_keys_of_the_meta_are_left():
    meta = {"steps": 3, "metrics": {"eval_loss": 1}, "PROCESSED_ALGORITHM": "HE", "c_diff": [1]}
    assert checked_meta(meta, ResultRules(), "steps", "metrics") == {
        "steps": 3,
        "metrics": {"eval_loss": 1.0},
    }
    rules = ResultRules.of({"also_meta": ["c_diff"], "equal_weights": True, "max_weight": None})
    assert checked_meta(meta | {"steps": "x"}, rules, "steps", "metrics") == {
        "steps": 1,
        "metrics": {"eval_loss": 1.0},
        "c_diff": [1],
    }


def test_without_a_weight_or_metrics_a_result_is_sound():
    assert checked_meta({"metrics": None}, ResultRules(), "steps", "metrics") == {}


def test_a_tied_weight_may_come_under_its_other_name_if_it_is_equal():
    values = sound()
    tied = {**values, "head": values["w"].clone()}
    assert list(checked_tensors(tied, EXPECTED)) == list(SPECS)
    values["head"] = values.pop("w")
    assert torch.equal(checked_tensors(values, EXPECTED)["w"], values["head"])
    with pytest.raises(PolicyError, match="head: expected the values of w"):
        checked_tensors({**tied, "head": Lazy(tied["w"] + 1)}, EXPECTED)


@pytest.mark.parametrize("num_values", [0, 5, 7])
def test_a_lazy_value_that_does_not_make_what_its_shape_says_is_refused(num_values: int):
    liar = Deferred(lambda: iter([torch.zeros(num_values)]), (2, 3), torch.float32)
    with pytest.raises(PolicyError, match="expected 6 values in w"):
        checked_tensors(sound() | {"w": liar}, EXPECTED)
