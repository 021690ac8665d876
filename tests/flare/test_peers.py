"""A site may call itself as it likes and fire what it likes: neither reaches a component of ours."""

import importlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvflare.apis.client import Client
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import (
    EventScope,
    FedEventHeader,
    FLContextKey,
    ReservedKey,
    ReturnCode,
    ServerCommandKey,
)
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from nvflare_llm_components.aggregators import CoordinateMedian
from nvflare_llm_components.components import COMPONENTS
from nvflare_llm_components.flare.gate import ResultGate
from nvflare_llm_components.flare.peers import inside_only, is_from_outside, peer_name_of, sender_of
from nvflare_llm_components.flare.taken import note_taken
from nvflare_llm_components.policy.results import ExpectedTensors, ResultRules
from nvflare_llm_components.widgets import RoundLog


def result(value: float, sender: str | None, claimed: object, number: int) -> Shareable:
    dxo = DXO(DataKind.WEIGHT_DIFF, {"w": torch.full((3,), value)}, {MetaKey.NUM_STEPS_CURRENT_ROUND: 1})
    message = dxo.to_shareable()
    if sender is not None:
        message.set_header(ServerCommandKey.FL_CLIENT, Client(sender, "token"))
    message.set_peer_props({ReservedKey.IDENTITY_NAME: claimed})
    message.set_header(AppConstants.CURRENT_ROUND, number)
    return message


def context(message: Shareable | None, claimed: object, **props: Any) -> FLContext:
    fl_ctx, peer = FLContext(), FLContext()
    peer.set_prop(ReservedKey.IDENTITY_NAME, claimed, private=False)
    if message is not None:
        peer.set_prop(FLContextKey.SHAREABLE, message, private=True)
    fl_ctx.set_peer_context(peer)
    for name, value in props.items():
        fl_ctx.set_prop(name, value, private=True, sticky=True)
    return fl_ctx


def outside(event_type: str) -> FLContext:
    """As FLARE's FedEventRunner fires what a site sent."""
    event = Shareable()
    event.set_header(FedEventHeader.EVENT_TYPE, event_type)
    event.set_header(FedEventHeader.DIRECTION, "in")
    return context(
        None, "evil", **{FLContextKey.EVENT_DATA: event, FLContextKey.EVENT_SCOPE: EventScope.FEDERATION}
    )


def test_the_token_says_who_it_is():
    message = result(0.0, "site-1", "site-2", 0)
    assert sender_of(message) == "site-1"
    assert peer_name_of(context(message, "site-2")) == "site-1"
    assert peer_name_of(context(None, "site-2")) == "site-2"


@pytest.mark.parametrize("claimed", [b"site-1", 7, None, ["site-1"]])
def test_a_name_that_is_no_text_is_none(claimed: object):
    assert peer_name_of(context(None, claimed)) is None


def test_a_name_from_outside_is_one_short_line():
    name = peer_name_of(context(None, "a\nb\x1b[2J" + "x" * 1000))
    assert name
    assert name.isprintable()
    assert len(name) < 200


def with_own_handler() -> list[type]:
    classes = [
        getattr(importlib.import_module(p.rpartition(".")[0]), p.rpartition(".")[2]) for p in COMPONENTS
    ]
    return [kind for kind in classes if kind.handle_event.__module__.startswith("nvflare_llm_components")
            or hasattr(kind.handle_event, "__wrapped__")]  # fmt: skip


@pytest.mark.parametrize("kind", with_own_handler(), ids=lambda kind: kind.__name__)
def test_no_component_acts_on_what_a_site_fires(kind: type):
    component = object.__new__(kind)  # without a single attribute: whatever it did would fail
    for event_type in (EventType.START_RUN, EventType.END_RUN, AppEventType.GLOBAL_BEST_MODEL_AVAILABLE,
                       AppEventType.ROUND_STARTED, AppEventType.AFTER_CONTRIBUTION_ACCEPT):  # fmt: skip
        kind.handle_event(component, event_type, outside(event_type))


def test_what_flare_fires_itself_is_seen():
    seen: list[str] = []

    class Seeing(FLComponent):
        @inside_only
        def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
            seen.append(event_type)

    Seeing().handle_event("own", FLContext())
    Seeing().handle_event("forged", outside("forged"))
    assert seen == ["own"]
    assert is_from_outside(outside("forged"))


@pytest.mark.parametrize("claimed", ["site-2", 7, b"site-1"])
def test_a_result_under_another_name_is_refused_and_blames_its_sender(claimed: object):
    message = result(0.1, "site-1", claimed, 0)
    fl_ctx = context(message, claimed, **{FLContextKey.TASK_RESULT: message, FLContextKey.TASK_NAME: "train"})
    expected = ResultRules(data_kind="WEIGHT_DIFF"), ExpectedTensors({"w": ((3,), torch.float32)})
    reason = ResultGate().inspect(lambda: expected, fl_ctx)
    assert reason
    assert "site 'site-1'" in reason
    assert "site-2" not in reason
    assert message.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR


def test_scatter_and_gather_gives_a_site_one_voice():
    workflow = ScatterAndGather(min_clients=3, num_rounds=9, train_task_name="train")
    workflow.aggregator = CoordinateMedian()
    workflow._current_round, workflow._phase = 5, AppConstants.PHASE_TRAIN
    workflow.fire_event = lambda *_: None
    fl_ctx = context(None, "server", **{AppConstants.CURRENT_ROUND: 5})
    for number in range(3):
        name = f"site-{number}"
        workflow._accept_train_result(name, result(0.1, name, name, 5), fl_ctx)
    evil = Client("evil", "token")
    for number, claimed in enumerate(["x", "site-0", "site-1", "site-2", "y"]):
        forged = result(1e6, "evil", claimed, 3 if number % 2 else 5)
        workflow.process_result_of_unknown_task(evil, "train", "made-up", forged, fl_ctx)
    assert sorted(workflow.aggregator._results) == ["evil", "site-0", "site-1", "site-2"]
    assert torch.equal(workflow.aggregator.aggregate_model().params["w"], torch.full((3,), 0.1))


def test_a_site_cannot_fill_anothers_places_in_what_was_taken():
    message = result(0.1, "evil", "victim", 2**31 - 1)
    props = {AppConstants.TRAINING_RESULT: message, AppConstants.AGGREGATION_ACCEPTED: True,
             AppConstants.CURRENT_ROUND: 4, "nvflare_llm_taken_rounds": {}}  # fmt: skip
    fl_ctx = context(message, "victim", **props)
    note_taken(fl_ctx)
    assert fl_ctx.get_prop("nvflare_llm_taken_rounds") == {}


def test_a_record_of_rounds_can_be_sorted_whatever_a_site_calls_itself():
    log = RoundLog()
    engine = SimpleNamespace(get_clients=lambda: [Client("site-1", "token")])
    fl_ctx = context(result(0.1, None, 7, 0), 7)
    fl_ctx.set_prop(ReservedKey.ENGINE, engine, private=True)
    fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0, private=True)
    log.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    log.handle_event(EventType.AFTER_TASK_DATA_FILTER, fl_ctx)
    assert log._round
    json.dumps(log._round.record(), sort_keys=True)


def test_all_handlers_of_ours_are_among_them():
    names = {kind.__name__ for kind in with_own_handler()}
    assert names >= {"HFSFTExecutor", "SafetensorsModelPersistor", "RoundLog", "FinalEvaluation"}
