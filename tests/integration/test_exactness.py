"""One site's federation through the real simulator is one centralized training, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvflare_llm_components.jobs.read import training_settings
from nvflare_llm_components.training.centralized import run_baseline
from tests.integration.simulator import Run, assert_completed, copy_job, simulate
from tests.tiny import write_site_data

pytestmark = pytest.mark.integration

NUM_ROUNDS = 3
SITE = "dolly"


def curve(records: list[dict[str, object]]) -> list[tuple[object, ...]]:
    """Logged losses and learning rates of training, step by step."""
    return [(r["step"], r["loss"], r["learning_rate"]) for r in records if r["kind"] == "train"]


@pytest.fixture
def _one_torch_thread() -> Iterator[None]:
    """As the simulated sites have: the number of threads decides the order of summation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def centralized(
    job: Path, folder: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[dict[str, object]]]:
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(model))
    monkeypatch.setenv("NVFLARE_LLM_DATA", str(data))
    settings = training_settings(job, SITE)
    trained = run_baseline(mode="one-call", folder=folder, num_rounds=NUM_ROUNDS, settings=settings)
    return trained, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def federated(job: Path, workspace: Path, model: Path, data: Path) -> Run:
    return simulate(job, workspace, sites=[SITE], model=model, data=data)


@pytest.mark.usefixtures("_one_torch_thread")
def test_one_site_federated_equals_centralized(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch):
    data = write_site_data(tmp_path / "data", [SITE], num_rows=13)
    job = copy_job("sft", tmp_path / "job", server={"num_clients": 1, "num_rounds": NUM_ROUNDS})
    run = federated(job, tmp_path / "workspace", model, data)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    trained, records = centralized(job, tmp_path / "centralized", model, data, monkeypatch)
    assert curve(run.records(SITE)) == curve(records)
    expected = load_file(trained / "model.safetensors")
    assert run.weights().keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(run.weights()[name], value), name
