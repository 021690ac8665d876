"""In Swarm a site averages: what others contribute is held against its model before it counts."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import (
    InTimeAccumulateWeightedAggregator,
)
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.ccwf.swarm_client_ctl import Gatherer

from nvflare_llm_components.persistors import SafetensorsModelPersistor
from tests.flare.test_gate import FORGERIES, HOSTILE, SITES, honest
from tests.sites import Site
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture
def swarm(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Gathers a round at site "a" with FLARE's own gatherer; gives the average, or what is left of none."""
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(model))
    aggregator = InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS)
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    here = Site(tmp_path / "a", "a", persistor, aggregator)
    peers = {name: Site(tmp_path / "peers" / name, name) for name in SITES}
    gatherer = Gatherer(
        Shareable(),
        here.new_context(),
        0,
        SimpleNamespace(update_status=lambda **_: None),
        aggregator,
        None,
        list(SITES),
        list(SITES),
        2,
        10,
        100,
    )

    def context(name: str, result: Shareable) -> FLContext:
        fl_ctx = here.context("swarm_report_learn_result", peers[name])
        fl_ctx.get_peer_context().set_prop(FLContextKey.SHAREABLE, result, private=True, sticky=True)
        return fl_ctx

    def gather(results: dict[str, Shareable]) -> Shareable:
        for name, result in results.items():
            result.set_header(AppConstants.CURRENT_ROUND, 0)
            result.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
            result.set_peer_props({"__identity_name__": name})
            gatherer.gather(name, result, context(name, result))
        return aggregator.aggregate(here.new_context())

    return gather


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_contribution_leaves_nothing_in_the_average(name: str, swarm, model: Path, caplog):
    forge, words = FORGERIES[name]
    results = {site: honest(model, value) for site, value in zip(SITES, (1.0, 2.0, 3.0), strict=True)}
    results[HOSTILE] = forge(results[HOSTILE])
    with caplog.at_level(logging.ERROR):
        average = from_shareable(swarm(results))
    assert {
        float(value) for tensor in average.data.values() for value in torch.as_tensor(tensor).unique()
    } == {2.0}
    assert len(average.data) == len(honest(model, 1.0)["DXO"]["data"])
    if "EXECUTION_" not in words:  # FLARE's gatherer itself takes no such return code
        (told,) = [r.getMessage() for r in caplog.records if "is refused:" in r.getMessage()]
        assert re.search(rf"contribution of site '{HOSTILE}' is refused: .*{words}", told)
        assert "\n" not in told


def test_honest_contributions_are_averaged(swarm, model: Path):
    results = {site: honest(model, value) for site, value in zip(SITES, (1.0, 2.0, 6.0), strict=True)}
    average = from_shareable(swarm(results))
    assert average.data
    assert all(torch.as_tensor(tensor).eq(3.0).all() for tensor in average.data.values())


def test_a_refused_contribution_tells_no_metric(swarm, model: Path):
    """FLARE's selector looks at what its site sent, whether or not it was averaged."""
    bad = FORGERIES["NaN"][0](honest(model, 1.0))
    swarm({HOSTILE: bad, "a": honest(model, 1.0), "c": honest(model, 1.0)})
    assert bad.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR
    assert "DXO" not in bad
