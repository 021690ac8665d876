"""FLARE's own exporters, with and without a copy of this package in the job."""

import json
from pathlib import Path
from typing import Any

import pytest
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.api import FedJob
from nvflare.job_config.defs import FilterType
from nvflare.recipe.spec import Recipe

from nvflare_llm_components.executors import HFSFTExecutor
from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.jobs.api import name_classes_only
from nvflare_llm_components.persistors import SafetensorsModelPersistor

LORA = {"peft_type": "LORA", "r": 4}


def make_job(name: str) -> FedJob:
    job = FedJob(name=name)
    job.to_server(FedAvg(num_clients=1, num_rounds=2))
    job.to_server(SafetensorsModelPersistor(model_name_or_path="/m", peft_config=LORA), id="persistor")
    job.to_server(
        PrecisionQuantizeFilter(precision="int8"), filter_type=FilterType.TASK_DATA, tasks=["train"]
    )
    job.to(HFSFTExecutor(model_name_or_path="/m", train_data="rows.jsonl", peft_config=LORA), "site-1")
    job.to(PrecisionDequantizeFilter(), "site-1", filter_type=FilterType.TASK_DATA, tasks=["train"])
    return job


def recipe(name: str) -> Recipe:
    return Recipe(make_job(name))


def export(job: Any, folder: Path) -> None:
    job.export(str(folder)) if isinstance(job, Recipe) else job.export_job(str(folder))


@pytest.mark.parametrize("make", [make_job, recipe])
def test_no_file_of_ours_is_in_the_job(make, tmp_path: Path):
    export(name_classes_only(make("lean")), tmp_path)
    assert not list(tmp_path.rglob("*.py"))
    assert not list(tmp_path.rglob("custom"))
    [client] = tmp_path.rglob("config_fed_client.json")
    [executor] = json.loads(client.read_text())["executors"]
    assert executor["executor"]["path"] == "nvflare_llm_components.executors.HFSFTExecutor"
    assert executor["executor"]["args"]["peft_config"] == LORA


def test_without_it_flare_copies_the_package(tmp_path: Path):
    """What this is for: where FLARE no longer does, the function can go."""
    export(make_job("fat"), tmp_path)
    assert list(tmp_path.rglob("custom/nvflare_llm_components/executors/__init__.py"))


def test_packages_that_the_job_named_stay(tmp_path: Path):
    job = make_job("both")
    job.set_app_packages(["mine"])
    assert name_classes_only(job).job.app_packages == ["mine", "nvflare_llm_components"]
