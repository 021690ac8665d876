import numpy
import pytest
import torch

from nvflare_llm_components.checkpoint.contributions import NonFiniteResults

NAN = torch.tensor([1.0, float("nan")])


class Encoded:
    def __init__(self, has_nonfinite: bool):
        self.has_nonfinite = has_nonfinite


def sentence_of(round_number: int = 3, **values: object) -> str:
    results = NonFiniteResults()
    results.note("dolly", 3, values)
    return results.sentence(round_number)


@pytest.mark.parametrize(
    "value",
    [NAN, NAN.bfloat16(), -NAN / 0, numpy.array([numpy.inf]), Encoded(True)],
    ids=["nan", "bf16", "infinite", "numpy", "encoded"],
)
def test_a_value_that_is_not_finite_is_named_with_its_site(value):
    assert sentence_of(good=torch.ones(2), bad=value) == "Site 'dolly' sent NaN or Inf in bad."


@pytest.mark.parametrize(
    "value",
    [torch.ones(2), torch.ones(0), torch.tensor([1]), numpy.ones(2), Encoded(False), None, "text", object()],
)
def test_any_other_value_is_passed_over(value):
    assert sentence_of(value=value) == ""


def test_further_tensors_are_counted_and_each_site_has_its_sentence():
    results = NonFiniteResults()
    results.note("dolly", None, {"a": NAN, "b": NAN, "c": NAN})
    results.note("alpaca", 0, {"b": NAN})
    assert results.sentence(0) == (
        "Site 'alpaca' sent NaN or Inf in b. Site 'dolly' sent NaN or Inf in a (+2 more)."
    )


def test_a_late_result_of_another_round_is_not_blamed():
    assert sentence_of(round_number=4, bad=NAN) == ""


def test_nothing_is_left_of_what_was_forgotten():
    results = NonFiniteResults()
    results.note("dolly", 3, {"bad": NAN})
    results.forget()
    assert results.sentence(3) == ""
