"""A site's best local model: kept where the job asks for it, and sent where the server asks for the best."""

import json
from pathlib import Path

import pytest
import torch
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants, ModelName

from nvflare_llm_components.executors import HFSFTExecutor
from nvflare_llm_components.flare.headers import ERROR_HEADER
from nvflare_llm_components.training.best import BestModel
from tests.tasks import result, task, weights_of

Weights = dict[str, torch.Tensor]


def train_two_rounds(
    executor: HFSFTExecutor, fl_ctx: FLContext, start: Weights, factor: float
) -> list[Weights]:
    """What the site sends in two rounds; the second begins with what it sent, times ``factor``."""
    first = result(executor.execute("train", task(start), fl_ctx, Signal())).data
    given = {name: value * factor for name, value in first.items()}
    return [first, result(executor.execute("train", task(given, 1), fl_ctx, Signal())).data]


def submitted(executor: HFSFTExecutor, fl_ctx: FLContext, name: str = ModelName.BEST_MODEL) -> Weights:
    request = Shareable()
    request.set_header(AppConstants.SUBMIT_MODEL_NAME, name)
    return result(executor.execute("submit_model", request, fl_ctx, Signal())).data


def is_same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def local_losses(tmp_path: Path) -> list[float]:
    records = map(json.loads, (tmp_path / "job" / "metrics.jsonl").read_text().splitlines())
    return [record["eval_loss"] for record in records if record["kind"] == "local_eval"]


@pytest.mark.parametrize(("factor", "best_round"), [(0.0, 0), (1.0, 1)], ids=["worse", "better"])
def test_the_best_of_the_rounds_is_sent_also_by_a_new_process(
    factor, best_round, make, model, fl_ctx, tmp_path
):
    executor = make(keep_best_local=True)
    sent = train_two_rounds(executor, fl_ctx, weights_of(model), factor)
    losses = local_losses(tmp_path)
    assert losses[best_round] == min(losses) < max(losses)
    executor._close()  # what a lost process leaves: no END_RUN
    for site in (make(keep_best_local=True), executor):
        assert is_same(submitted(site, fl_ctx), sent[best_round])
        assert is_same(submitted(site, fl_ctx, "last_model"), sent[1])


def test_keeping_the_best_changes_no_training_and_is_off_by_default(make, model, fl_ctx, tmp_path):
    runs = []
    for arguments in ({}, {"keep_best_local": True}):
        executor = make(checkpoint="never", **arguments)
        sent = train_two_rounds(executor, fl_ctx, weights_of(model), 0.0)
        runs.append(sent)
        assert is_same(submitted(executor, fl_ctx), sent[0 if arguments else 1])
        assert len(local_losses(tmp_path)) == (2 if arguments else 0)
    assert all(is_same(*pair) for pair in zip(*runs, strict=True))


def test_the_best_needs_data_to_be_told_by(make, model, fl_ctx):
    executor = make(keep_best_local=True, eval_data=None)
    reply = executor.execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert all(word in reply.get_header(ERROR_HEADER) for word in ["keep_best_local", "eval_data"])


def test_a_half_written_or_diverged_model_is_never_the_best(tmp_path):
    best = BestModel(tmp_path / "best_local.safetensors")
    (tmp_path / ".best_local.safetensors.partial").write_text("half")
    assert best.read() is None
    for loss in (float("nan"), 2.0, 3.0, float("nan")):
        best.offer(loss, {"weight": torch.tensor([loss])})
    assert best.read() == {"weight": torch.tensor([2.0])}
    assert best.loss == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["best_local.safetensors"]
