import math

import pytest

from nvflare_llm_components.checkpoint.key_metric import KeyMetric, means_of


@pytest.mark.parametrize(("mode", "better"), [("min", 1.0), ("max", 3.0)])
def test_the_mode_says_what_is_better(mode: str, better: float):
    key = KeyMetric("m", mode)
    assert key.is_better(better, 2.0)
    assert not key.is_better(2.0, 2.0)
    assert not key.is_better(2.0, better)
    assert not key.is_better(math.nan, 2.0)


def test_what_a_record_names():
    assert KeyMetric.of({}) == KeyMetric("eval_loss", "min")
    assert KeyMetric.of({"key_metric": {"name": "accuracy"}}) == KeyMetric("accuracy", "max")
    key = KeyMetric("accuracy", "max")
    assert KeyMetric.of({"key_metric": key.record()}) == key


def test_a_metric_that_some_site_left_out_has_no_mean():
    assert means_of({"a": {"loss": 1.0, "other": 5.0}, "b": {"loss": 2.0}}) == {"loss": 1.5}
    assert means_of({}) == {}
