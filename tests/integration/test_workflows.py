"""FLARE's workflows beside FedAvg's plain averaging, each as its shipped job."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.integration.simulator import (
    NUM_ROUNDS,
    SITES,
    Run,
    assert_clean,
    assert_completed,
    global_losses,
    run_job,
)
from tests.integration.stock import stock_loss
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.integration


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


@pytest.fixture(scope="module")
def diff(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Run:
    return run_job("sft_diff", tmp_path_factory.mktemp("diff"), model=model, data=data)


def test_differences_give_the_federation_that_whole_weights_give(diff: Run, sft: Run):
    assert_completed(diff, num_rounds=NUM_ROUNDS)
    assert_close(diff.weights(), sft.weights())


def test_fedopt_steps_the_servers_optimizer(diff: Run, tmp_path: Path, model: Path, data: Path):
    """With learning rate 1 and no momentum that step is FedAvg's."""

    def plain_sgd(config: dict[str, Any]) -> None:
        config.update(server_learning_rate=1.0, server_momentum=0.0)

    run = run_job(
        "sft_fedopt", tmp_path, model=model, data=data, server=plain_sgd, also_allow=["torch.optim.SGD"]
    )
    assert_completed(run, num_rounds=NUM_ROUNDS)
    assert "FedOpt" in run.log("server")
    assert_close(run.weights(), diff.weights())


def test_fedprox_holds_the_sites_near_the_global_model(sft: Run, tmp_path: Path, model: Path, data: Path):
    def hold(config: dict[str, Any]) -> None:
        config["fedprox_mu"] = 100.0

    run = run_job("sft_fedprox", tmp_path, model=model, data=data, server=hold)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    start = load_file(model / "model.safetensors")
    assert 0 < distance(run.weights(), start) < 0.8 * distance(sft.weights(), start)


def test_cyclic_relays_one_model_from_site_to_site(tmp_path: Path, model: Path, data: Path):
    run = run_job("sft_cyclic", tmp_path, model=model, data=data)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    visits = sorted((record["time"], site) for site in SITES for record in run.records(site, kind="round"))
    first, second = (site for _, site in visits[: len(SITES)])
    assert [site for _, site in visits] == [first, second] * NUM_ROUNDS
    # The second site starts from what the first one made, not from the job's model.
    of_the_start = {site: stock_loss(model, data / site / "validation.jsonl") for site in SITES}
    assert global_losses(run, first)[0] == pytest.approx(of_the_start[first], rel=1e-5)
    assert global_losses(run, second)[0] < of_the_start[second] - 1e-2


def test_swarm_keeps_the_models_on_the_sites(sft: Run, tmp_path: Path, model: Path, data: Path):
    run = run_job("sft_swarm", tmp_path, model=model, data=data)
    assert_clean(run)
    for site in SITES:
        assert [record["round"] for record in run.records(site, kind="round")] == list(range(NUM_ROUNDS))
        assert run.federation(site=site)["round"] == NUM_ROUNDS - 1
        assert_close(run.weights(site=site), sft.weights())
    assert not list(run.run_dir("server").rglob("*.safetensors"))


def test_the_first_weights_may_come_from_a_site(tmp_path: Path, model: Path, data: Path):
    sites_model = save_tiny_model(tmp_path / "sites_model", seed=1)

    def own_model(config: dict[str, Any]) -> None:
        config["model"] = str(sites_model)

    policy = [f'places.models=["{tmp_path}", "$NVFLARE_LLM_MODEL"]', 'leaves.initial_weights="any"']
    run = run_job("sft_initialize_weights", tmp_path, model=model, data=data, client=own_model, policy=policy)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    for site in SITES:
        expected = stock_loss(sites_model, data / site / "validation.jsonl")
        assert global_losses(run, site)[0] == pytest.approx(expected, rel=1e-5)


def test_scaffold_is_refused_with_the_reason(tmp_path: Path, model: Path, data: Path):
    def scaffold(config: dict[str, Any]) -> None:
        workflow = config["workflows"][0]
        workflow["path"] = "nvflare.app_common.workflows.scaffold.Scaffold"
        workflow["args"] = {name: workflow["args"][name] for name in ("num_clients", "num_rounds")}

    run = run_job("sft", tmp_path, model=model, data=data, server=scaffold)
    assert run.exit_code != 0
    reason = "found Scaffold's control variates"
    assert reason in run.log("server")
    # The first refusal aborts the job, perhaps before the other site was given its task.
    assert any(reason in run.log(site) for site in SITES)
    assert not run.model_dir().exists()
