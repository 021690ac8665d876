"""How often points of a curve travel, by the events that an executor fires."""

from pathlib import Path

import pytest
from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal

from nvflare_llm_components.executors import HFSFTExecutor
from nvflare_llm_components.flare.pace import Pace
from tests.sites import Site
from tests.tasks import SFT, result, task, weights_of


class Curves(FLComponent):
    """Hears each point that travels."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[str, int]] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == ANALYTIC_EVENT_TYPE:
            point = from_shareable(fl_ctx.get_prop(FLContextKey.EVENT_DATA)).data
            self.points.append((point["track_key"], point["global_step"]))


def train(folder: Path, model: Path, data: Path, rounds: int) -> list[tuple[str, int]]:
    curves = Curves()
    executor = HFSFTExecutor(
        model_name_or_path=str(model), train_data=str(data), eval_data=str(data), sft_config=SFT
    )
    site = Site(folder, "site-1", executor, curves)
    for number in range(rounds):
        fl_ctx = site.context()
        fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, site.get_workspace(), private=True, sticky=False)
        result(executor.execute("train", task(weights_of(model), number), fl_ctx, Signal()))
    site.fire_event(EventType.END_RUN, site.context())
    return curves.points


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["slow steps", "fast steps"])
def test_whole_steps_travel_and_what_comes_once_a_round_always(
    seconds: float, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Pace.__init__, "__defaults__", (seconds, *Pace.__init__.__defaults__[1:]))
    points = train(tmp_path, model, data, rounds=2)
    steps = [step for tag, step in points if tag == "train/loss"]
    assert steps == ([1] if seconds else [1, 2, 3, 4, 5, 6])
    assert [step for tag, step in points if tag == "train/grad_norm"] == steps
    assert [step for tag, step in points if tag == "round/train_loss"] == [3, 6]
    assert [step for tag, step in points if tag == "eval/loss"] == [0, 3]
