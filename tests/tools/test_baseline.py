import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from nvflare_llm_components.tools.baseline import baseline
from nvflare_llm_components.tools.generation import generate
from nvflare_llm_components.tools.runs import find_runs
from tests.tiny import save_tiny_model, write_site_data

SITES = ["a", "b"]
JOB_CONFIGS = Path(__file__).parents[2] / "job_configs"


@pytest.fixture
def model(tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "tiny")
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(model))
    monkeypatch.setenv("NVFLARE_LLM_DATA", str(write_site_data(tmp_path / "data", SITES)))
    return model


@pytest.mark.usefixtures("model")
def test_baseline_trains_all_sites_rows_with_the_budget_of_the_job(tmp_path):
    saved = baseline(JOB_CONFIGS / "sft", SITES, "one-call", tmp_path / "central")
    rows = [json.loads(line) for line in (tmp_path / "central/data/training.jsonl").read_text().splitlines()]
    assert {row["input"][0] for row in rows} == {"a", "b"}
    (run,) = find_runs(tmp_path / "central")
    rounds = run.metrics("round")
    assert [(record["round"], record["num_examples"]) for record in rounds] == [
        (n, len(rows)) for n in range(3)
    ]
    assert AutoModelForCausalLM.from_pretrained(saved).num_parameters() > 0


@pytest.mark.usefixtures("model")
def test_a_second_baseline_replaces_the_curves_of_the_first(tmp_path):
    for _ in range(2):
        baseline(JOB_CONFIGS / "sft", ["a"], "iterative-fixed", tmp_path / "central")
    (run,) = find_runs(tmp_path / "central")
    losses = [record["eval_loss"] for record in run.metrics("eval")[:3]]
    assert len(run.metrics("round")) == 3
    assert losses[0] == losses[1] == losses[2]


def test_an_unknown_mode_and_no_site_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match="one-call"):
        baseline(JOB_CONFIGS / "sft", ["a"], "twice", tmp_path / "central")
    with pytest.raises(ValueError, match="`sites` should name at least one site"):
        baseline(JOB_CONFIGS / "sft", [], "one-call", tmp_path / "central")


def test_generation_answers_each_prompt(model):
    answers = generate(model, str(model), ["1 + 2?", "3"], max_new_tokens=3)
    assert len(answers) == 2
    assert answers == generate(model, str(model), ["1 + 2?", "3"], max_new_tokens=3)
