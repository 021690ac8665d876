"""The executor builds while FLARE fetches its first task, and writes its state while FLARE sends a result."""

import gc
import threading
from pathlib import Path

import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants
from transformers import PreTrainedModel

from nvflare_llm_components.executors import ERROR_HEADER, HFSFTExecutor
from tests.tasks import result, task, weights_of
from tests.tiny import save_tiny_model

WAIT_S = 30
BROKEN = {
    "before the model": ({"train_data": "/nowhere/rows.jsonl"}, "/nowhere/rows.jsonl"),
    "after the model": ({"peft_config": {"peft_type": "LORA", "target_modules": ["nope"]}}, "nope"),
}


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("nvflare-llm-")]


def wait_for_threads() -> None:
    for thread in ours():
        thread.join(WAIT_S)
    assert not ours()


def models_in_memory() -> int:
    gc.collect()
    return sum(issubclass(type(found), PreTrainedModel) for found in gc.get_objects())


@pytest.fixture
def dropping(tmp_path: Path) -> Path:
    """A model whose training draws random numbers."""
    return save_tiny_model(tmp_path / "dropping", attention_dropout=0.1)


@pytest.fixture
def in_simulator(fl_ctx: FLContext) -> FLContext:
    fl_ctx.set_prop(ReservedKey.RUN_NUM, SimulatorConstants.JOB_NAME, private=False)
    return fl_ctx


@pytest.mark.parametrize("stage", BROKEN)
def test_a_failed_build_answers_each_task_with_its_cause(stage, make, model, fl_ctx):
    arguments, cause = BROKEN[stage]
    executor = make(**arguments)
    executor.handle_event(EventType.START_RUN, fl_ctx)
    for number in range(2):
        reply = executor.execute("train", task(weights_of(model), number), fl_ctx, Signal())
        assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
        assert cause in reply.get_header(ERROR_HEADER)
    wait_for_threads()


def test_a_failed_build_holds_no_model(make, model, fl_ctx):
    before = models_in_memory()
    arguments, _ = BROKEN["after the model"]
    executor = make(**arguments)
    executor.handle_event(EventType.START_RUN, fl_ctx)
    wait_for_threads()
    assert models_in_memory() == before
    executor.execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert models_in_memory() == before


def test_the_end_of_the_job_ends_a_build(make, fl_ctx, tmp_path):
    before = models_in_memory()
    executor = make()
    executor.handle_event(EventType.START_RUN, fl_ctx)
    assert ours()
    executor.handle_event(EventType.END_RUN, fl_ctx)
    wait_for_threads()
    assert models_in_memory() == before
    assert not (tmp_path / "job" / "trainer_state").exists()


def test_what_is_built_beforehand_trains_alike(make, dropping, fl_ctx):
    arguments = {"model_name_or_path": str(dropping), "checkpoint": "never"}
    sent = []
    for is_beforehand in (False, True):
        executor = make(**arguments)
        if is_beforehand:
            executor.handle_event(EventType.START_RUN, fl_ctx)
            wait_for_threads()
            torch.rand(7)  # another thread of FLARE's may draw until the task comes
        rounds = [executor.execute("train", task(weights_of(dropping), n), fl_ctx, Signal()) for n in (0, 1)]
        sent.append([result(reply) for reply in rounds])
        executor.handle_event(EventType.END_RUN, fl_ctx)
    for asked, beforehand in zip(*sent, strict=True):
        assert beforehand.meta == asked.meta
        assert not [name for name in asked.data if not torch.equal(asked.data[name], beforehand.data[name])]


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
