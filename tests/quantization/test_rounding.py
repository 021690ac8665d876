"""What leaves a site has no more digits than its policy says, at every precision of the table."""

import pytest
import torch

from nvflare_llm_components.policy.site import FOR_DIFFERENCES, Leaves
from nvflare_llm_components.quantization.precision import CODECS, PRECISIONS
from nvflare_llm_components.quantization.rounding import rounded

LEVELS = {"int8": 256, "nf4": 16, "int2": 4}


def test_a_policy_may_name_every_precision_of_the_table():
    for name in PRECISIONS:
        assert Leaves(precision=name).precision == name
    assert {name for name, codec in CODECS.items() if codec.is_for_differences} == set(FOR_DIFFERENCES)


@pytest.mark.parametrize("precision", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_have_the_digits_of_the_codec_and_keep_shape_and_dtype(precision: str, dtype: torch.dtype):
    values = {"w": torch.randn(3, 64, generator=torch.manual_seed(0)).to(dtype), "n": torch.arange(3)}
    found = rounded(values, precision)
    assert found["n"] is values["n"]
    assert found["w"].shape == (3, 64)
    assert found["w"].dtype == dtype
    assert (found["w"] - values["w"]).norm() < 0.5 * values["w"].norm()
    if precision in LEVELS:
        assert len(found["w"][0].unique()) <= LEVELS[precision]
    if dtype == torch.float32:
        assert not torch.equal(found["w"], values["w"])


@pytest.mark.parametrize("precision", CODECS)
def test_a_norm_is_rounded_as_well(precision: str):
    """On the wire small vectors travel as they are; what a site's policy forbids must not."""
    values = {"norm.weight": torch.randn(48, generator=torch.manual_seed(1))}
    found = rounded(values, precision)["norm.weight"]
    assert not torch.equal(found, values["norm.weight"])
    assert len(found.unique()) <= LEVELS.get(precision, 48)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_beyond_a_formats_range_is_its_largest(precision: str):
    largest = torch.finfo(CODECS[precision].dtype).max
    found = rounded({"w": torch.tensor([torch.finfo(torch.float32).max, -1.0, torch.inf])}, precision)["w"]
    assert found.tolist() == [largest, -1.0, torch.inf]


def test_nothing_is_done_where_all_digits_may_leave():
    values = {"w": torch.randn(4)}
    assert rounded(values, "fp32") is values
