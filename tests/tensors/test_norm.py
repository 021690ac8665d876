import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.tensors import blocks
from nvflare_llm_components.tensors.norm import distance


@given(st.lists(st.floats(-1e3, 1e3, width=32), max_size=40), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_it_is_the_norm_of_the_whole_step_however_it_is_cut(values, block):
    step = np.asarray(values, dtype=np.float32)
    old = {"a": torch.ones(len(values)), "count": torch.tensor(3)}
    new = {"a": old["a"] + torch.from_numpy(step), "count": torch.tensor(4), "new": step}
    expected = torch.cat([(new["a"] - old["a"]).double(), torch.from_numpy(step).double()]).norm().item()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_LENGTH", block)
        assert distance(new, old) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_what_is_small_beside_what_is_large_is_not_lost():
    value = torch.full((2**19,), 1e-4)
    value[0] = 1e4
    assert distance({"a": value}, {}) == pytest.approx(math.hypot(1e4, 1e-4 * 2**9.5), rel=1e-12)


def test_a_value_that_is_not_finite_is_told():
    assert math.isinf(distance({"a": torch.tensor([torch.inf])}, {}))
    assert math.isnan(distance({"a": torch.tensor([torch.nan])}, {"a": torch.zeros(1)}))


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected values of shape"):
        distance({"a": torch.zeros(2**18 + 1)}, {"a": torch.zeros(1)})


def test_a_difference_of_narrow_numbers_is_taken_in_wide_ones():
    new, old = ({"a": torch.full((3,), value, dtype=torch.float16)} for value in (60000.0, -60000.0))
    assert distance(new, old) == pytest.approx(120000 * math.sqrt(3), rel=1e-3)
