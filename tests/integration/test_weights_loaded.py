"""Sites really work on the global model: what they measure of it is what stock transformers measures."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.simulator import SITES, Run, assert_completed, global_losses, keep_every_round, run_job
from tests.integration.stock import stock_loss

pytestmark = pytest.mark.integration

# Put into every process by the name that Python imports at its start.
SKIP_ONE_WEIGHT = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

class Sabotage(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "nvflare_llm_components.training.weights":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            load = module.load
            def load_all_but_one(model, values):
                own = module.snapshot(model)
                skipped = next(iter(own))
                load(model, {**values, skipped: own[skipped]})
            module.load = load_all_but_one
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Sabotage())
"""


def assert_sites_measured_the_saved_models(run: Run, model: Path, data: Path) -> None:
    received = [model, run.model_dir("round_0")]
    for site in SITES:
        measured = global_losses(run, site)
        expected = [stock_loss(folder, data / site / "validation.jsonl") for folder in received]
        assert measured == pytest.approx(expected, rel=1e-5), site


def test_sites_measure_what_stock_transformers_measures(sft: Run, model: Path, data: Path):
    assert_sites_measured_the_saved_models(sft, model, data)


def test_a_weight_that_is_not_loaded_is_seen(tmp_path: Path, model: Path, data: Path):
    (tmp_path / "sabotage").mkdir()
    (tmp_path / "sabotage" / "sitecustomize.py").write_text(SKIP_ONE_WEIGHT)

    def learn_fast(config: dict[str, Any]) -> None:
        config["learning_rate"] = 5e-3

    run = run_job(
        "sft",
        tmp_path,
        model=model,
        data=data,
        server=keep_every_round,
        client=learn_fast,
        environment={"PYTHONPATH": str(tmp_path / "sabotage")},
    )
    assert_completed(run, num_rounds=2)
    with pytest.raises(AssertionError):
        assert_sites_measured_the_saved_models(run, model, data)
