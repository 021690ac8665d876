"""Whether values are finite, of every kind of tensor."""

import math

import pytest
import torch

from nvflare_llm_components.tensors.finite import count_nonfinite, ends_of


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_value_that_is_not_finite_counts(dtype: torch.dtype):
    values = torch.tensor([[1.0, math.nan], [math.inf, -math.inf]], dtype=dtype)
    assert count_nonfinite(values) == 3
    assert count_nonfinite(values[:, :1]) == 1
    assert count_nonfinite(values[:1, :1]) == 0


@pytest.mark.parametrize(
    "values", [torch.empty(0), torch.empty(3, 0), torch.tensor([2**40]), torch.tensor(True)]
)
def test_what_can_not_be_anything_else_is_finite(values: torch.Tensor):
    assert count_nonfinite(values) == 0


def test_the_ends_are_those_of_all_values_and_nan_where_one_is():
    assert ends_of(torch.tensor([3.0, -2.0, 1.0])) == (-2.0, 3.0)
    assert ends_of(torch.empty(0)) == (0.0, 0.0)
    assert all(map(math.isnan, ends_of(torch.tensor([3.0, math.nan]))))
