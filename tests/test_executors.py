"""The executor's tasks, through FLARE's own Shareable, DXO and FLContext."""

import json
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from nvflare_llm_components.flare.headers import ERROR_HEADER
from tests.tasks import LAST_ROUND, NUM_ROUNDS, NUM_ROWS, SFT, result, task, weights_of

LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def test_train_sends_plain_copies_under_checkpoint_names(make, model, fl_ctx):
    executor = make()
    reply = executor.execute("train", task(weights_of(model)), fl_ctx, Signal())
    dxo = result(reply)
    assert dxo.data.keys() == weights_of(model).keys()
    for value in dxo.data.values():
        assert type(value) is torch.Tensor
        assert value.is_contiguous()
    before = {name: value.clone() for name, value in dxo.data.items()}
    executor.execute("train", task(weights_of(model), 1), fl_ctx, Signal())
    assert all(torch.equal(before[name], dxo.data[name]) for name in before)
    assert dxo.meta[MetaKey.NUM_STEPS_CURRENT_ROUND] == NUM_ROWS
    assert dxo.meta[MetaKey.INITIAL_METRICS].keys() == {"eval_loss", "eval_perplexity", "train_loss"}
    assert reply.get_header(AppConstants.CURRENT_ROUND) == 0


def test_train_keeps_the_message_but_drops_its_weights(make, model, fl_ctx):
    shared = weights_of(model)
    shareable = task(shared)
    result(make().execute("train", shareable, fl_ctx, Signal()))
    assert "DXO" not in shareable
    assert shareable.get_header(AppConstants.NUM_ROUNDS) == NUM_ROUNDS
    assert torch.equal(shared["model.norm.weight"], weights_of(model)["model.norm.weight"])


def test_diff_plus_received_is_full(make, model, fl_ctx):
    received = {name: value.to(torch.float16) for name, value in weights_of(model).items()}
    full = result(make().execute("train", task(received), fl_ctx, Signal()))
    diff = result(make(params_type="DIFF").execute("train", task(received), fl_ctx, Signal()))
    assert diff.data_kind == DataKind.WEIGHT_DIFF
    for name, change in diff.data.items():
        assert change.dtype == torch.float32
        torch.testing.assert_close(received[name].float() + change, full.data[name], rtol=0, atol=1e-7)


class Lazy:
    def __init__(self, value: torch.Tensor):
        self.value = value

    def materialize(self) -> torch.Tensor:
        return self.value


@pytest.mark.parametrize(
    "convert", [lambda v: v.numpy(), Lazy, lambda v: v.double()], ids=["numpy", "lazy", "double"]
)
def test_values_of_any_kind_train_alike(convert, make, model, fl_ctx):
    expected = result(make().execute("train", task(weights_of(model)), fl_ctx, Signal()))
    converted = {name: convert(value) for name, value in weights_of(model).items()}
    found = result(make().execute("train", task(converted), fl_ctx, Signal()))
    assert all(torch.equal(found.data[name], expected.data[name]) for name in expected.data)


@pytest.mark.parametrize("params_type", ["FULL", "DIFF"])
def test_a_stock_persistors_state_dict_trains_alike(params_type, make, model, fl_ctx):
    """`PTFileModelPersistor` sends `model.state_dict()`, where a tied weight has each of its names."""
    received = weights_of(model)
    stock = dict(received)
    stock["lm_head.weight"] = stock.pop("model.embed_tokens.weight")
    found = [
        result(make(params_type=params_type).execute("train", task(values), fl_ctx, Signal())).data
        for values in (received, stock, {**received, "lm_head.weight": stock["lm_head.weight"].clone()})
    ]
    assert all(values.keys() == received.keys() for values in found)
    assert all(torch.equal(values[name], found[0][name]) for values in found for name in received)
    unequal = {**received, "lm_head.weight": stock["lm_head.weight"] + 1}
    reply = make().execute("train", task(unequal), fl_ctx, Signal())
    assert "lm_head.weight: expected the values of model.embed_tokens" in reply.get_header(ERROR_HEADER)


def test_adapters_travel_under_peft_names(make, fl_ctx, named_model):
    executor = make(peft_config=LORA)
    first = result(executor.execute("get_weights", Shareable(), fl_ctx, Signal())).data
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in first
    trained = result(executor.execute("train", task(first), fl_ctx, Signal())).data
    assert trained.keys() == first.keys()
    assert all(not torch.equal(trained[name], first[name]) for name in first)


def test_validate_reports_the_received_model_and_keeps_its_own(make, model, fl_ctx, named_model):
    executor = make()
    zeros = {name: torch.zeros_like(value) for name, value in weights_of(model).items()}
    before = result(executor.execute("submit_model", Shareable(), fl_ctx, Signal())).data
    dxo = result(executor.execute("validate", task(zeros), fl_ctx, Signal()))
    after = result(executor.execute("submit_model", Shareable(), fl_ctx, Signal())).data
    assert dxo.data_kind == DataKind.METRICS
    assert dxo.data["eval_loss"] == pytest.approx(np.log(264), rel=1e-3)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_metrics_have_a_line_for_each_step_evaluation_and_round(make, model, fl_ctx, tmp_path):
    executor = make()
    for number in range(2):
        result(executor.execute("train", task(weights_of(model), number), fl_ctx, Signal()))
    lines = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["round"]) for line in lines] == [
        (kind, number) for number in range(2) for kind in ("eval", "train", "train", "train", "round")
    ]
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [(line["start_step"], line["end_step"]) for line in rounds] == [(0, 3), (3, 6)]
    assert [line["num_examples"] for line in rounds] == [NUM_ROWS, NUM_ROWS]
    assert list((tmp_path / "job" / "tb_events").glob("events.out.tfevents.*"))


def missing(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if name != "model.norm.weight"}


def surplus(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return weights | {"extra.weight": torch.zeros(1)}


def misshaped(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return weights | {"model.norm.weight": torch.zeros(3)}


def nonfinite(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return weights | {"model.norm.weight": torch.full((32,), torch.nan)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, ["1 missing (model.norm.weight)"]),
        (surplus, ["1 surplus (extra.weight)"]),
        (misshaped, ["model.norm.weight", "(32,)", "(3,)"]),
        (nonfinite, ["model.norm.weight", "NaN or infinity"]),
    ],
)
def test_unusable_global_model_is_refused_by_name(change, words, make, model, fl_ctx):
    reply = make().execute("train", task(change(weights_of(model))), fl_ctx, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert all(word in reply.get_header(ERROR_HEADER) for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"train_data": "/nowhere/rows.jsonl"}, ["train_data", "/nowhere/rows.jsonl"]),
        ({"train_data": None}, ["train_data", "None", "variable"]),
        ({"model_name_or_path": "/nowhere/model"}, ["model_name_or_path", "/nowhere/model"]),
        ({"model_name_or_path": None}, ["model_name_or_path", "None", "variable"]),
        (
            {"peft_config": {"peft_type": "LORA", "target_modules": ["nope"]}},
            ["peft_config", "nope", "q_proj"],
        ),
        ({"peft_config": {"peft_type": "WHAT"}}, ["peft_config", "WHAT"]),
        ({"local_steps": 1, "local_epochs": 1}, ["local_steps", "local_epochs"]),
        ({"sft_config": {"num_train_epochs": 2}}, ["num_train_epochs", "local_epochs"]),
        ({"sft_config": {"lerning_rate": 2}}, ["sft_config", "lerning_rate"]),
        ({"model_kwargs": {"trust_remote_code": True}}, ["trust_remote_code"]),
        ({"params_type": "HALF"}, ["params_type", "HALF"]),
        ({"num_processes": 1000}, ["num_processes", "1000"]),
        ({"num_processes": "all"}, ["num_processes", "auto"]),
        ({"sharding": "half"}, ["sharding", "half"]),
        ({"offload": "disk"}, ["offload", "disk"]),
        ({"offload": "cpu"}, ["offload", "sharding 'full'", "'none'"]),
        ({"offload": "cpu", "sharding": "full"}, ["offload", "several processes", "num_processes 1"]),
        ({"model_kwargs": {"distributed_config": {"fsdp_size": 2}}}, ["distributed_config"]),
        ({"sft_config": {"fsdp": "full_shard"}}, ["fsdp"]),
    ],
)
def test_wrong_arguments_fail_at_the_first_task_with_their_name(arguments, words, make, model, fl_ctx):
    reply = make(**arguments).execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert all(word in reply.get_header(ERROR_HEADER) for word in ["site-1", *words])


def test_a_message_still_encoded_names_the_missing_filter(make, model, fl_ctx):
    reply = make().execute("train", task(weights_of(model), nvflare_llm_precision={}), fl_ctx, Signal())
    assert reply.get_return_code() == ReturnCode.BAD_REQUEST_DATA
    assert "PrecisionDequantizeFilter" in reply.get_header(ERROR_HEADER)
    # FLARE's model selector prints a traceback for a reply that is no DXO.
    assert from_shareable(reply).data_kind == DataKind.METRICS


def test_an_unknown_task_is_unsupported(make, fl_ctx):
    assert (
        make().execute("dance", Shareable(), fl_ctx, Signal()).get_return_code()
        == ReturnCode.TASK_UNSUPPORTED
    )


def test_abort_ends_a_round_and_leaves_no_thread(make, model, fl_ctx):
    signal = Signal()
    executor = make(local_steps=10**6)
    threading.Timer(1.0, signal.trigger, [True]).start()
    reply = executor.execute("train", task(weights_of(model)), fl_ctx, signal)
    assert reply.get_return_code() == ReturnCode.TASK_ABORTED
    assert "nvflare-llm-training" not in [thread.name for thread in threading.enumerate()]


def test_a_failed_task_without_a_state_on_disk_says_what_is_lost(make, model, fl_ctx, tmp_path, caplog):
    executor = make(checkpoint="never", local_steps=2)
    result(executor.execute("train", task(weights_of(model), 0), fl_ctx, Signal()))
    broken = task(misshaped(weights_of(model)), 1)
    assert executor.execute("train", broken, fl_ctx, Signal()).get_return_code() != ReturnCode.OK
    with caplog.at_level("WARNING"):
        result(executor.execute("train", task(weights_of(model), 1), fl_ctx, Signal()))
    assert "its last 1 rounds left no state on disk (checkpoint='never')" in caplog.text
    lines = map(json.loads, (tmp_path / "job" / "metrics.jsonl").read_text().splitlines())
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


@pytest.mark.parametrize("name", ["current_round", "start_round", "num_rounds"])
@pytest.mark.parametrize("value", [-1, 2**70, 1.5, "3", True])
def test_a_header_that_is_no_number_of_a_round_is_refused(name, value, make, model, fl_ctx):
    given = task(weights_of(model))
    given.set_header(name, value)
    reply = make().execute("train", given, fl_ctx, Signal())
    assert reply.get_return_code() == ReturnCode.BAD_REQUEST_DATA
    assert name in reply.get_header(ERROR_HEADER)


def test_scaffold_is_refused_clearly(make, model, fl_ctx):
    reply = make().execute("train", task(weights_of(model), scaffold_c_global={}), fl_ctx, Signal())
    assert reply.get_return_code() == ReturnCode.BAD_REQUEST_DATA
    assert "Scaffold" in reply.get_header(ERROR_HEADER)


def moved(reply: Shareable, start: dict[str, torch.Tensor]) -> float:
    return float(sum((value - start[name]).square().sum() for name, value in result(reply).data.items()))


def test_the_servers_fedprox_mu_is_honoured(make, model, fl_ctx):
    start, sgd = weights_of(model), SFT | {"optim": "sgd", "max_grad_norm": 0.0}
    free = make(sft_config=sgd, checkpoint="never").execute("train", task(start), fl_ctx, Signal())
    pulled = make(sft_config=sgd, checkpoint="never").execute(
        "train", task(start, fedprox_mu=20.0), fl_ctx, Signal()
    )
    assert moved(pulled, start) < 0.95 * moved(free, start)


def test_a_restarted_executor_sends_its_round_again(make, model, fl_ctx):
    first = make(checkpoint="always")
    reply = first.execute("train", task(weights_of(model)), fl_ctx, Signal())
    first._close()  # what a killed process leaves: no END_RUN
    again = make(checkpoint="always").execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert result(again).meta == result(reply).meta
    assert all(torch.equal(value, result(reply).data[name]) for name, value in result(again).data.items())


def test_the_end_of_the_job_removes_the_training_state(make, model, fl_ctx, tmp_path):
    executor = make(checkpoint="always")
    executor.execute("train", task(weights_of(model), LAST_ROUND), fl_ctx, Signal())
    assert list((tmp_path / "job" / "trainer_state").glob("step-*"))
    executor.handle_event(EventType.END_RUN, fl_ctx)
    assert not (tmp_path / "job" / "trainer_state").exists()


def test_a_job_that_ends_before_its_last_round_keeps_the_training_state(make, model, fl_ctx, tmp_path):
    """As where the server failed: FLARE then asks its sites to end the run, as at any other end."""
    executor = make(checkpoint="always")
    resumed = task(weights_of(model), 3)  # of two rounds that begin with this one
    resumed.set_header(AppConstants.START_ROUND, 3)
    executor.execute("train", resumed, fl_ctx, Signal())
    executor.handle_event(EventType.END_RUN, fl_ctx)
    assert list((tmp_path / "job" / "trainer_state").glob("step-*"))


@pytest.mark.parametrize("is_abort", [True, False])
def test_an_abort_keeps_the_training_state_for_the_run_that_continues(
    make, model, fl_ctx, tmp_path, is_abort
):
    executor = make(checkpoint="always")
    executor.execute("train", task(weights_of(model), LAST_ROUND), fl_ctx, Signal())
    # FLARE's client sets it to False as well: where the job ends while a task is still running.
    fl_ctx.set_prop(FLContextKey.RUN_ABORT_REQUESTED, is_abort, private=True, sticky=False)
    executor.handle_event(EventType.END_RUN, fl_ctx)
    kept = [path.name for path in (tmp_path / "job").glob("trainer_state/*")]
    assert kept == (["step-3"] if is_abort else [])


def test_weights_are_there_before_any_training(make, model, fl_ctx, named_model):
    shareable = Shareable()
    shareable.set_header(AppConstants.SUBMIT_MODEL_NAME, "best_model")
    for name in ("submit_model", "get_weights"):
        data = result(make().execute(name, shareable, fl_ctx, Signal())).data
        assert all(torch.equal(value, weights_of(model)[name]) for name, value in data.items())


def test_a_server_without_a_model_starts_from_the_sites_own(make, model, fl_ctx, named_model):
    dxo = result(make().execute("train", task({}), fl_ctx, Signal()))
    assert dxo.data.keys() == weights_of(model).keys()


def test_a_relative_path_is_found_in_the_app(make, model, data, fl_ctx, tmp_path):
    app = tmp_path / "job" / "app_site-1"
    app.mkdir(parents=True)
    (app / "rows.jsonl").write_bytes(data.read_bytes())
    result(make(train_data="rows.jsonl").execute("train", task(weights_of(model)), fl_ctx, Signal()))


class Watch(Signal):
    """Polled at each step of the training: notes whether the incoming values are still in memory."""

    def __init__(self, values: list[weakref.ref]):
        self.values = values
        self.alive: list[int] = []
        super().__init__()

    @property
    def triggered(self) -> bool:
        self.alive.append(sum(value() is not None for value in self.values))
        return False

    @triggered.setter
    def triggered(self, value: bool) -> None:
        assert not value


def test_the_incoming_message_is_out_of_memory_while_training(make, model, fl_ctx):
    data = {name: Lazy(value) for name, value in weights_of(model).items()}
    watch = Watch([weakref.ref(value) for value in data.values()])
    shareable = task(data)
    del data
    result(make().execute("train", shareable, fl_ctx, watch))
    assert watch.alive
    assert set(watch.alive) == {0}
