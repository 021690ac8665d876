"""A job whose evaluation after the last round fails has its model all the same."""

from pathlib import Path

import pytest

from tests.integration.simulator import NUM_ROUNDS, SITES, Run, executor_args, run_job


def without_eval_data(config: dict) -> None:
    executor_args(config).update(eval_data=None, keep_best_local=False)


def assert_the_model_is_there(run: Run) -> None:
    assert run.exit_code == 0, run.output[-4000:]
    assert run.final_round() == NUM_ROUNDS - 1
    assert run.weights()
    for site in SITES:
        assert "expected eval_data" in run.log(site)
        assert [record["round"] for record in run.records(site, kind="round")] == list(range(NUM_ROUNDS))


@pytest.mark.integration
def test_cross_site_evaluation(tmp_path: Path, model: Path, data: Path):
    run = run_job("sft_cross_site_eval", tmp_path, model=model, data=data, client=without_eval_data)
    assert_the_model_is_there(run)


@pytest.mark.integration
@pytest.mark.slow
def test_evaluation_of_the_global_models(tmp_path: Path, model: Path, data: Path):
    run = run_job("sft_best_model", tmp_path, model=model, data=data, client=without_eval_data)
    assert_the_model_is_there(run)
