"""What the executor leaves behind: nothing of a failed build, and its state while FLARE sends a result."""

import gc
import threading
from pathlib import Path

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants
from transformers import PreTrainedModel

from nvflare_llm_components.executors import HFSFTExecutor
from nvflare_llm_components.flare.headers import ERROR_HEADER
from tests.tasks import result, task, weights_of

WAIT_S = 30
BROKEN = {
    "before the model": ({"train_data": "/nowhere/rows.jsonl"}, "/nowhere/rows.jsonl"),
    "after the model": ({"peft_config": {"peft_type": "LORA", "target_modules": ["nope"]}}, "nope"),
}


def models_in_memory() -> int:
    gc.collect()
    return sum(issubclass(type(found), PreTrainedModel) for found in gc.get_objects())


@pytest.fixture
def in_simulator(fl_ctx: FLContext) -> FLContext:
    fl_ctx.set_prop(ReservedKey.RUN_NUM, SimulatorConstants.JOB_NAME, private=False)
    return fl_ctx


@pytest.mark.parametrize("stage", BROKEN)
def test_a_failed_build_answers_each_task_with_its_cause(stage, make, model, fl_ctx):
    arguments, cause = BROKEN[stage]
    executor = make(**arguments)
    for number in range(2):
        reply = executor.execute("train", task(weights_of(model), number), fl_ctx, Signal())
        assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
        assert cause in reply.get_header(ERROR_HEADER)


def test_a_failed_build_holds_no_model(make, model, fl_ctx):
    before = models_in_memory()
    arguments, _ = BROKEN["after the model"]
    make(**arguments).execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert models_in_memory() == before


def after_sending(executor: HFSFTExecutor, fl_ctx: FLContext, name: str = "train") -> threading.Thread:
    """FLARE's event after a result is sent, in a thread that may have to wait."""
    fl_ctx.set_prop(FLContextKey.TASK_NAME, name, private=True, sticky=False)
    event = threading.Thread(target=executor.handle_event, args=[EventType.AFTER_SEND_TASK_RESULT, fl_ctx])
    event.start()
    return event


def train_behind(gate: threading.Event, executor: HFSFTExecutor, model: Path, fl_ctx: FLContext) -> None:
    """Trains a round whose last writing goes on until the gate opens."""
    result(executor.execute("train", task(weights_of(model)), fl_ctx, Signal()))
    executor._session._worker.submit(lambda: gate.wait(WAIT_S))


def test_the_simulator_waits_until_the_state_is_on_disk(make, model, in_simulator, tmp_path):
    executor, gate = make(), threading.Event()
    train_behind(gate, executor, model, in_simulator)
    event = after_sending(executor, in_simulator)
    event.join(0.5)
    assert event.is_alive()
    gate.set()
    event.join(WAIT_S)
    assert list((tmp_path / SimulatorConstants.JOB_NAME / "trainer_state").glob("step-*/progress.json"))


@pytest.mark.parametrize(("context", "name"), [("fl_ctx", "train"), ("in_simulator", "swarm_report")])
def test_nobody_else_waits(context, name, make, model, request):
    fl_ctx = request.getfixturevalue(context)
    executor, gate = make(), threading.Event()
    train_behind(gate, executor, model, fl_ctx)
    event = after_sending(executor, fl_ctx, name)
    event.join(WAIT_S / 2)
    is_waiting = event.is_alive()
    gate.set()
    assert not is_waiting
