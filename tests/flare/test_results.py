import math

import pytest
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import make_reply

from nvflare_llm_components.flare.results import metrics_of


def test_the_finite_numbers_of_a_validation():
    data = {"eval_loss": 1.5, "steps": 2, "broken": math.nan, "name": "x"}
    assert metrics_of(DXO(DataKind.METRICS, data).to_shareable()) == {"eval_loss": 1.5, "steps": 2.0}


@pytest.mark.parametrize("result", [make_reply(ReturnCode.EXECUTION_EXCEPTION), None, {}])
def test_a_failed_validation_has_none(result):
    assert metrics_of(result) == {}
