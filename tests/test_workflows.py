"""Rounds that go on without some of their sites: FLARE's own controller and communicator, results by hand."""

import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from nvflare_llm_components.aggregators import OrderedAverage
from nvflare_llm_components.flare.headers import ERROR_HEADER
from nvflare_llm_components.persistors import SafetensorsModelPersistor
from nvflare_llm_components.workflows import FINAL_FILE, FinalEvaluation, QuorumFedAvg
from tests.federation import Federation
from tests.sites import JOB_ID
from tests.tasks import weights_of
from tests.tiny import save_tiny_model

SITES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def started(model: Path, tmp_path: Path) -> Callable[..., Federation]:
    def start(**settings: object) -> Federation:
        persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
        workflow = QuorumFedAvg(num_clients=3, num_rounds=1, task_check_period=0.01, **settings)
        return Federation(tmp_path / "server", workflow, {"persistor": persistor}, sites=SITES).start()

    return start


def result(model: Path, value: float, weight: int = 1) -> Shareable:
    """A round's result: every weight is the value."""
    data = {name: torch.full_like(tensor, value) for name, tensor in weights_of(model).items()}
    return DXO(DataKind.WEIGHTS, data, {MetaKey.NUM_STEPS_CURRENT_ROUND: weight}).to_shareable()


def failure(reason: str) -> Shareable:
    return make_reply(ReturnCode.EXECUTION_EXCEPTION, headers={ERROR_HEADER: reason})


def saved(server: Federation) -> set[float]:
    values = weights_of(server.run_dir / "global_model" / "last").values()
    return {float(value) for tensor in values for value in tensor.unique()}


def num_standing_after_a_look(server: Federation) -> int:
    """Let the workflow look, and FLARE take away what the workflow has ended."""
    server.workflow.get_num_standing_tasks()
    server.communicator.check_tasks()
    return server.communicator.get_num_standing_tasks()


def test_a_failing_site_costs_its_round_and_no_other(started, model):
    server = started(quorum=2)
    for site in SITES:
        server.ask(site)
    server.answer("a", failure("out of memory"))
    server.answer("b", result(model, 1.0))
    server.answer("c", result(model, 3.0))
    server.end()
    assert server.panic is None
    assert saved(server) == {2.0}


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_each_average_is_made_once_as_it_is_saved(kind, model, tmp_path, monkeypatch):
    """Nothing the size of the model lies in memory: neither the averages, nor their sums with the model."""
    combined = []
    average = OrderedAverage._combined

    def counted(self: OrderedAverage, name: str, *rest: object) -> torch.Tensor:
        assert (tmp_path / "server" / JOB_ID / "global_model").is_dir(), "made before it is saved"
        combined.append(name)
        return average(self, name, *rest)

    monkeypatch.setattr(OrderedAverage, "_combined", counted)
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model), results={"data_kind": kind})
    workflow = QuorumFedAvg(num_clients=3, num_rounds=2, task_check_period=0.01)
    server = Federation(tmp_path / "server", workflow, {"persistor": persistor}, sites=SITES).start()
    expected = {name: value.clone() for name, value in weights_of(model).items()}
    for step in range(2):
        for number, site in enumerate(SITES):
            server.ask(site)
            changes = {
                name: torch.full_like(value, 2.0 ** (step + number)) for name, value in expected.items()
            }
            if kind == DataKind.WEIGHTS:
                changes = {name: value + changes[name] for name, value in expected.items()}
            meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: 2 if number else 4}
            server.answer(site, DXO(kind, changes, meta).to_shareable())
        if kind == DataKind.WEIGHT_DIFF:
            expected = {name: value + 2.0 ** (step + 1) for name, value in expected.items()}
        else:
            expected = {
                name: sum(share * (value + 2.0 ** (step + n)) for n, share in enumerate((0.5, 0.25, 0.25)))
                for name, value in expected.items()
            }
    server.end()
    assert server.panic is None
    assert sorted(combined) == sorted(2 * list(expected))
    found = weights_of(server.run_dir / "global_model" / "last")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_rule_that_may_leave_an_average_unsaved_makes_it_at_once(model, started):
    server = started(stop_cond="eval_loss < 0")
    for number, site in enumerate(SITES):
        server.ask(site)
        server.answer(site, result(model, float(number)))
    server.end()
    assert server.panic is None
    assert not server.workflow.aggregator.lazy_shapes


def test_error_replies_do_not_count_as_results(started, model):
    """FLARE's own min_responses would end this round with one result, or none."""
    server = started(quorum=1, grace_s=0)
    for site in SITES:
        server.ask(site)
    server.answer("a", failure("no rows"))
    server.answer("b", failure("no rows"))
    assert num_standing_after_a_look(server) == 1
    server.answer("c", result(model, 5.0))
    server.end()
    assert saved(server) == {5.0}


def test_a_silent_site_is_not_waited_for_beyond_the_grace(started, model):
    server = started(quorum=2, grace_s=0.05)
    for site in SITES:
        server.ask(site)
    server.answer("b", result(model, 1.0))
    server.answer("c", result(model, 3.0))
    server.end()
    assert saved(server) == {2.0}
    server.answer("a", result(model, 1e6))  # too late: nothing of it is in the model
    assert saved(server) == {2.0}


def test_within_the_grace_the_others_still_count(started, model):
    server = started(quorum=2, grace_s=600)
    for site in SITES:
        server.ask(site)
    server.answer("a", result(model, 1.0))
    server.answer("b", result(model, 2.0))
    assert num_standing_after_a_look(server) == 1
    server.answer("c", result(model, 6.0))
    server.end()
    assert saved(server) == {3.0}


def test_a_quorum_out_of_reach_ends_the_job_and_names_the_sites(started, model):
    server = started(quorum=2)
    for site in SITES:
        server.ask(site)
    server.answer("a", failure("training.jsonl is missing"))
    server.answer("b", result(model, 1.0))
    server.answer("c", failure("out of memory"))
    server.end()
    assert "Site 'a' failed: training.jsonl is missing" in server.panic
    assert "Site 'c' failed: out of memory" in server.panic
    assert "at least 2 (quorum)" in server.panic
    assert not (server.run_dir / "global_model" / "last").exists()


def test_by_default_every_site_must_answer(started, model):
    server = started()
    for site in SITES:
        server.ask(site)
    server.answer("a", result(model, 1.0))
    server.answer("b", result(model, 1.0))
    assert num_standing_after_a_look(server) == 1
    server.answer("c", failure("out of memory"))
    server.end()
    assert "Site 'c' failed: out of memory" in server.panic


def test_where_not_all_sites_train_the_log_says_so(model, tmp_path, caplog):
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = QuorumFedAvg(num_clients=2, num_rounds=1, task_check_period=0.01)
    server = Federation(tmp_path / "server", workflow, {"persistor": persistor}, sites=SITES)
    with caplog.at_level("WARNING"):
        server.start()
        while not workflow._quorum.sites:
            time.sleep(0.01)
        asked = workflow._quorum.sites
        for site in asked:
            server.ask(site)
            server.answer(site, result(model, 2.0))
        server.end()
    assert saved(server) == {2.0}
    assert "Round 0: 2 of 3 sites train, drawn at random" in caplog.text


@pytest.mark.parametrize("quorum", [0, 4, -1])
def test_a_quorum_that_cannot_be_is_refused_when_the_job_is_parsed(quorum):
    with pytest.raises(ValueError, match="quorum: expected 1 to num_clients=3"):
        QuorumFedAvg(num_clients=3, num_rounds=1, quorum=quorum)


@pytest.mark.parametrize("grace_s", [-1, float("inf"), float("nan")])
def test_a_grace_that_cannot_be_is_refused(grace_s):
    with pytest.raises(ValueError, match="grace_s"):
        QuorumFedAvg(num_clients=3, num_rounds=1, grace_s=grace_s)


@pytest.fixture
def trained(started: Callable[..., Federation], model: Path) -> Federation:
    """A server whose job has trained one round: every weight is 2, the sites weigh 1, 1 and 2."""
    server = started()
    for site in SITES:
        server.ask(site)
    for site, weight in zip(SITES, (1, 1, 2), strict=True):
        server.answer(site, result(model, 2.0, weight))
    server.end()
    return server


def evaluated(trained: Federation, folder: Path, model: Path, losses: dict[str, float | None]) -> Federation:
    """The same run directory, where the next workflow asks the sites for the last model's loss."""
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = FinalEvaluation(task_check_period=0.01)
    server = Federation(folder / "server", workflow, {"persistor": persistor}, sites=SITES)
    fl_ctx = server.new_context()
    fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0, private=True, sticky=False)
    server.fire_event(AppEventType.ROUND_STARTED, fl_ctx)
    for site, weight in zip(SITES, (1, 1, 2), strict=True):
        context = server.context(site)
        context.set_prop(AppConstants.TRAINING_RESULT, result(model, 2.0, weight), private=True, sticky=False)
        context.set_prop(AppConstants.AGGREGATION_ACCEPTED, True, private=True, sticky=False)
        server.fire_event(AppEventType.AFTER_CONTRIBUTION_ACCEPT, context)
    server.start()
    sent = [server.ask(site) for site in SITES]
    assert {float(v) for each in sent for t in from_shareable(each).data.values() for v in t.unique()} == {
        2.0
    }
    for site, loss in losses.items():
        metrics = DXO(DataKind.METRICS, {"eval_loss": loss}).to_shareable()
        server.answer(site, failure("no rows") if loss is None else metrics)
    server.end()
    assert server.panic is None
    return server


def best_of(server: Federation) -> dict[str, object]:
    record: dict[str, object] = json.loads((server.run_dir / "global_model/best/federation.json").read_text())
    return record


def test_the_last_model_is_evaluated_with_the_sites_weights_and_can_be_best(trained, tmp_path, model):
    server = evaluated(trained, tmp_path, model, {"a": 1.0, "b": 3.0, "c": 2.0})
    assert best_of(server)["metrics"] == {"eval_loss": 2.0}
    assert best_of(server)["round"] == 0
    files = [server.run_dir / "global_model" / name / "model.safetensors" for name in ("last", "best")]
    assert files[0].samefile(files[1])  # a link: nothing is written twice
    record = json.loads((server.run_dir / FINAL_FILE).read_text())
    assert record == {"round": 0, "eval_loss": 2.0, "sites": {"a": 1.0, "b": 3.0, "c": 2.0}}


def test_sites_that_cannot_evaluate_are_left_out(trained, tmp_path, model):
    server = evaluated(trained, tmp_path, model, {"a": None, "b": 4.0, "c": 1.0})
    assert best_of(server)["metrics"] == {"eval_loss": 2.0}  # (4 + 2 * 1) / 3


def test_where_no_site_can_evaluate_the_job_ends_well_all_the_same(trained, tmp_path, model):
    server = evaluated(trained, tmp_path, model, dict.fromkeys(SITES))
    assert not (server.run_dir / "global_model/best").exists()
    assert not (server.run_dir / FINAL_FILE).exists()


def test_a_job_that_goes_on_after_its_last_round_tells_the_models_round(
    started: Callable[..., Federation], tmp_path: Path, model: Path
):
    """The server was lost in what comes after the last round: the job that continues begins no round."""
    before = started(start_round=3)
    for site in SITES:
        before.ask(site)
    for site in SITES:
        before.answer(site, result(model, 2.0))
    before.end()
    earlier = before.run_dir.rename(before.run_dir.with_name("earlier"))
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model), resume_from=str(earlier))
    workflow = FinalEvaluation(task_check_period=0.01)
    server = Federation(tmp_path / "server", workflow, {"persistor": persistor}, sites=SITES).start()
    for site in SITES:
        assert server.ask(site).get_header(AppConstants.CURRENT_ROUND) == 4
        server.answer(site, DXO(DataKind.METRICS, {"eval_loss": 1.0}).to_shareable())
    server.end()
    assert json.loads((server.run_dir / FINAL_FILE).read_text())["round"] == 3
    assert best_of(server)["round"] == 3


def test_a_better_best_stays(trained, tmp_path, model):
    evaluated(trained, tmp_path, model, dict.fromkeys(SITES, 1.0))
    server = evaluated(trained, tmp_path, model, dict.fromkeys(SITES, 5.0))
    assert best_of(server)["metrics"] == {"eval_loss": 1.0}


def random_result(model: Path, seed: int, weight: int) -> Shareable:
    generator = torch.Generator().manual_seed(seed)
    data = {n: torch.randn(t.shape, generator=generator) for n, t in weights_of(model).items()}
    return DXO(DataKind.WEIGHTS, data, {MetaKey.NUM_STEPS_CURRENT_ROUND: weight}).to_shareable()


def test_by_default_the_model_has_the_same_bits_in_any_order_of_arrival(model: Path, tmp_path: Path):
    models = []
    for order in itertools.permutations(range(3)):
        persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
        workflow = QuorumFedAvg(num_clients=3, num_rounds=1, task_check_period=0.005)
        folder = tmp_path / "".join(map(str, order))
        server = Federation(folder, workflow, {"persistor": persistor}, sites=SITES).start()
        for site in SITES:
            server.ask(site)
        for index in order:
            server.answer(SITES[index], random_result(model, index, (3, 7, 11)[index]))
        server.end()
        models.append(weights_of(server.run_dir / "global_model/last"))
    assert all(torch.equal(one[name], models[0][name]) for one in models for name in models[0])


def test_by_default_one_site_gets_its_own_bits_back(model: Path, tmp_path: Path):
    """FLARE's own mean multiplies by the weight and divides again."""
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = QuorumFedAvg(num_clients=1, num_rounds=1, task_check_period=0.005)
    server = Federation(tmp_path, workflow, {"persistor": persistor}, sites=["a"]).start()
    server.ask("a")
    sent = random_result(model, 0, 7)
    expected = dict(from_shareable(sent).data)
    server.answer("a", sent)
    server.end()
    found = weights_of(server.run_dir / "global_model/last")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_result_that_is_being_taken_when_the_grace_ends_is_in_the_average(model: Path, tmp_path: Path):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(OrderedAverage):
        def accept_model(self, given: FLModel) -> None:
            if given.meta["client_name"] == "c":
                begun.set()
                assert go_on.wait(30)
            super().accept_model(given)

    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = QuorumFedAvg(
        num_clients=3, num_rounds=1, quorum=2, grace_s=600, aggregator=Slow(), task_check_period=0.005
    )
    server = Federation(tmp_path, workflow, {"persistor": persistor}, sites=SITES).start()
    for site in SITES:
        server.ask(site)
    server.answer("a", result(model, 1.0))
    server.answer("b", result(model, 2.0))
    taking = threading.Thread(target=server.answer, args=("c", result(model, 6.0)))
    taking.start()
    assert begun.wait(30)
    workflow.grace_s = 0
    assert workflow.get_num_standing_tasks() == 1  # the grace is over, the task cancelled
    assert workflow.get_num_standing_tasks() == 1
    go_on.set()
    taking.join(30)
    server.end()
    assert saved(server) == {3.0}


def test_a_second_answer_to_a_task_does_not_count(started, model):
    server = started(quorum=3)
    for site in SITES:
        server.ask(site)
    server.answer("a", result(model, 1.0))
    server.answer("a", result(model, 1e6, 1000))
    server.answer("b", result(model, 2.0))
    assert num_standing_after_a_look(server) == 1
    server.answer("c", result(model, 6.0))
    server.end()
    assert saved(server) == {3.0}


def test_an_answer_to_another_sites_task_does_not_count(started, model):
    server = started(quorum=3)
    for site in SITES:
        server.ask(site)
    server._tasks["b"], own = server._tasks["a"], server._tasks["b"]
    server.answer("b", result(model, 1e6, 1000))
    server._tasks["b"] = own
    for site, value in zip(SITES, (1.0, 2.0, 6.0), strict=True):
        server.answer(site, result(model, value))
    server.end()
    assert saved(server) == {3.0}


def test_a_site_that_comes_back_is_given_the_round_that_stands_then(model: Path, tmp_path: Path):
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = QuorumFedAvg(num_clients=3, num_rounds=2, quorum=2, task_check_period=0.005)
    server = Federation(tmp_path, workflow, {"persistor": persistor}, sites=SITES).start()
    for site in SITES:
        server.ask(site)
    server.answer("b", result(model, 1.0))
    server.answer("c", result(model, 3.0))  # the round ends without a
    for site in ("b", "c"):
        server.ask(site)
    server.answer("a", result(model, 1e6, 1000))  # of the round before
    assert server.workflow._received_count == 0
    assert server.ask("a").get_header(AppConstants.CURRENT_ROUND) == 1
    server.answer("a", result(model, 5.0))
    server.answer("b", result(model, 7.0))
    server.end()
    assert server.panic is None
    assert saved(server) == {6.0}


def test_where_all_sites_fail_the_job_ends_with_every_reason(started):
    server = started(quorum=1)
    for site in SITES:
        server.ask(site)
    for site in SITES:
        server.answer(site, failure(f"no rows at {site}"))
    server.end()
    assert all(f"Site '{site}' failed: no rows at {site}." in server.panic for site in SITES)


def test_a_result_that_the_aggregator_refuses_counts_as_a_failure(model: Path, tmp_path: Path):
    class Picky(OrderedAverage):
        def accept_model(self, given: FLModel) -> None:
            if given.meta["client_name"] == "a":
                raise ValueError("not this one")
            super().accept_model(given)

    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = QuorumFedAvg(num_clients=3, num_rounds=1, aggregator=Picky(), task_check_period=0.005)
    server = Federation(tmp_path, workflow, {"persistor": persistor}, sites=SITES).start()
    for site in SITES:
        server.ask(site)
    server.answer("a", result(model, 1.0))
    server.end()
    assert "Site 'a' failed: not this one" in server.panic


def test_only_the_sites_that_were_drawn_are_asked_and_waited_for(model: Path, tmp_path: Path):
    persistor = SafetensorsModelPersistor(model_name_or_path=str(model))
    workflow = QuorumFedAvg(num_clients=2, num_rounds=1, task_check_period=0.005)
    server = Federation(tmp_path, workflow, {"persistor": persistor}, sites=SITES).start()
    while len(workflow._quorum.sites) < 2:
        time.sleep(0.002)
    for site, value in zip(workflow._quorum.sites, (1.0, 3.0), strict=True):
        server.ask(site)
        server.answer(site, result(model, value))
    server.end()
    assert server.panic is None
    assert saved(server) == {2.0}


def test_an_abort_ends_a_waiting_round_without_a_model(started, model):
    server = started(quorum=3)
    for site in SITES:
        server.ask(site)
    server.answer("a", result(model, 1.0))
    server.runner.abort(server.new_context())
    server.end()
    assert server.panic is None
    assert not (server.run_dir / "global_model" / "last").exists()
