"""Every shipped job is resolved as FLARE resolves it, and each class path is bound to its arguments."""

import inspect
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from nvflare.fuel.utils.json_scanner import JsonScanner
from nvflare.fuel.utils.wfconf import resolve_var_refs

from nvflare_llm_components.executors import HFSFTExecutor
from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.jobs.shipped import SHIPPED
from nvflare_llm_components.jobs.write import write_job

JOB_CONFIGS = Path(__file__).parents[1] / "job_configs"
JOBS = sorted(folder.name for folder in JOB_CONFIGS.iterdir() if folder.is_dir())
CONFIGS = sorted(JOB_CONFIGS.rglob("config_fed_*.json"))
SWARM = "sft_swarm"  # no weights pass through its server
FilterUse = tuple[list[str], str, dict[str, Any]]
ENVIRONMENT = {"NVFLARE_LLM_MODEL": "/models/tiny", "NVFLARE_LLM_DATA": "/data"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def resolved(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(file.read_text())
    resolve_var_refs(JsonScanner(config), dict(config) | {"SITE_NAME": "dolly"})
    return config


def components(node: object) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "path" in node and node.get("config_type") != "dict":
            yield node["path"], node.get("args", {})
        for value in node.values():
            yield from components(value)
    elif isinstance(node, list):
        for value in node:
            yield from components(value)


def configs_of(job: str) -> tuple[dict[str, Any], dict[str, Any]]:
    server, client = (
        resolved(JOB_CONFIGS / job / f"app/config/config_fed_{side}.json") for side in ("server", "client")
    )
    return server, client


def filters_of(config: dict[str, Any], chain: str) -> list[FilterUse]:
    return [
        (entry["tasks"], item["path"].rsplit(".", 1)[1], item["args"])
        for entry in config[chain]
        for item in entry["filters"]
    ]


def test_readme_table_names_every_job_and_no_other():
    table = (JOB_CONFIGS / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[`(\w+)`\]\(\1\) \|", table, flags=re.MULTILINE)) == JOBS


@pytest.mark.parametrize("job", JOBS)
def test_job_is_json_only(job: str):
    files = {
        str(file.relative_to(JOB_CONFIGS / job)) for file in (JOB_CONFIGS / job).rglob("*") if file.is_file()
    }
    assert files == {"meta.json", "app/config/config_fed_server.json", "app/config/config_fed_client.json"}
    assert json.loads((JOB_CONFIGS / job / "meta.json").read_text())["name"] == job


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f"{f.parts[-4]}-{f.stem}")
def test_every_class_path_takes_its_arguments(file: Path):
    found = list(components(resolved(file)))
    assert found
    for path, args in found:
        module, name = path.rsplit(".", 1)
        cls = getattr(import_module(module), name)
        inspect.signature(cls).bind(**args)
        if path.startswith("nvflare_llm_components."):
            assert cls.__module__ == module
            cls(**args)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f"{f.parts[-4]}-{f.stem}")
def test_every_variable_is_defined_and_used(file: Path):
    config = json.loads(file.read_text())
    used = set(re.findall(r"\{(\w+)\}", file.read_text()))
    assert used <= config.keys() | {"SITE_NAME"}
    settings = {name for name, value in config.items() if not isinstance(value, list | dict)}
    of_flare = {"format_version", "get_task_timeout", "submit_task_result_timeout"}
    assert settings - of_flare <= used
    assert "{" not in str([*components(resolved(file))]).replace("{'", "").replace("{}", "")


@pytest.mark.parametrize("job", JOBS)
def test_the_folder_is_what_the_writer_writes(job: str, tmp_path: Path):
    """After a change of the writer: ``nvflare-llm job shipped --out job_configs``."""
    write_job(SHIPPED[job], tmp_path / job)
    written, shipped = (
        {file.relative_to(root): file.read_text() for file in root.rglob("*.json")}
        for root in (tmp_path / job, JOB_CONFIGS / job)
    )
    assert written == shipped


def test_every_shipped_choice_has_its_folder():
    assert sorted(SHIPPED) == JOBS


@pytest.mark.parametrize("job", [job for job in JOBS if job != SWARM])
def test_filters_are_paired_in_both_directions(job: str):
    server, client = configs_of(job)
    assert_paired(filters_of(server, "task_data_filters"), filters_of(client, "task_data_filters"))
    assert_paired(filters_of(client, "task_result_filters"), filters_of(server, "task_result_filters"))


def test_swarm_filters_are_paired_between_the_sites():
    _, client = configs_of(SWARM)
    sent, received = client["task_data_filters"]
    assert (sent["direction"], received["direction"]) == ("out", "in")
    both = filters_of(client, "task_data_filters")
    assert_paired(both[:1], both[1:])


def assert_paired(sender: list[FilterUse], receiver: list[FilterUse]) -> None:
    ((sent_tasks, sent, _),), ((received_tasks, received, _),) = sender, receiver
    assert (sent, received) == (PrecisionQuantizeFilter.__name__, PrecisionDequantizeFilter.__name__)
    assert sent_tasks == received_tasks
    assert "*" not in sent_tasks, "FLARE matches filter tasks exactly"


@pytest.mark.parametrize("job", JOBS)
def test_server_and_client_agree_on_model_and_adapter(job: str):
    server, client = configs_of(job)
    if job != SWARM:
        for name in ("model", "precision", "peft_config"):
            assert server.get(name) == client.get(name)
    executor = next(args for path, args in components(client) if path.endswith(HFSFTExecutor.__name__))
    assert executor["train_data"] == "/data/dolly/training.jsonl"


def test_the_server_of_a_quantized_base_is_that_of_any_adapter():
    """It has no model but the adapter, so it needs no bitsandbytes."""
    assert configs_of("peft_qlora")[0] == configs_of("peft_lora")[0]
