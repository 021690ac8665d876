"""Which model is the best one, and who says so: jobs that evaluate the server's models at their end."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.integration.simulator import NUM_ROUNDS, SITES, Run, assert_completed, keep_every_round, run_job
from tests.integration.stock import stock_loss

pytestmark = pytest.mark.integration


def losses_by_round(run: Run, data: Path) -> list[float]:
    """Mean over the sites of what stock transformers measures of each round's global model."""
    return [
        mean(stock_loss(run.model_dir(f"round_{number}"), data / site / "validation.jsonl") for site in SITES)
        for number in range(NUM_ROUNDS)
    ]


def cross_val_results(run: Run) -> dict[str, Any]:
    file = run.run_dir("server") / "cross_site_val" / "cross_val_results.json"
    results: dict[str, Any] = json.loads(file.read_text())
    return results


def assert_best_is_the_best(run: Run, data: Path) -> None:
    losses = losses_by_round(run, data)
    best = run.federation("best")
    assert losses[best["round"]] == min(losses)
    assert best["metrics"]["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert best["sha256"] == run.federation(f"round_{best['round']}")["sha256"]


def test_the_final_aggregate_can_be_the_best(tmp_path: Path, model: Path, data: Path):
    run = run_job("sft_best_model", tmp_path, model=model, data=data, server=keep_every_round)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    assert run.federation("best")["round"] == NUM_ROUNDS - 1
    assert_best_is_the_best(run, data)


def test_sites_evaluate_each_others_and_the_servers_models(tmp_path: Path, model: Path, data: Path):
    run = run_job("sft_cross_site_eval", tmp_path, model=model, data=data, server=keep_every_round)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    assert_best_is_the_best(run, data)
    results = cross_val_results(run)
    for site in SITES:
        assert results[site].keys() == {"SRV_source", "SRV_last", "SRV_best", *SITES}
        expected = stock_loss(run.model_dir("last"), data / site / "validation.jsonl")
        assert results[site]["SRV_last"]["eval_loss"] == pytest.approx(expected, rel=1e-5)
        local = [record["eval_loss"] for record in run.records(site, kind="local_eval")]
        assert len(local) == NUM_ROUNDS
        assert results[site][site]["eval_loss"] == pytest.approx(min(local), rel=1e-5)
