import json
from pathlib import Path

import pytest

from nvflare_llm_components.jobs.read import app_name, config_file, num_rounds, training_settings

JOB_CONFIGS = Path(__file__).parents[2] / "job_configs"


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("NVFLARE_LLM_MODEL", "/models/m")
    monkeypatch.setenv("NVFLARE_LLM_DATA", "/data")


def write_job(folder: Path, side: str, config: dict) -> Path:
    file = folder / "app/config" / f"config_fed_{side}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.usefixtures("environment")
def test_settings_of_a_shipped_job_are_those_of_one_site():
    settings = training_settings(JOB_CONFIGS / "peft_lora", "dolly")
    assert settings.model_name_or_path == "/models/m"
    assert settings.train_data == Path("/data/dolly/training.jsonl")
    assert settings.eval_data == Path("/data/dolly/validation.jsonl")
    assert settings.peft_config is not None
    assert settings.peft_config["peft_type"] == "LORA"
    assert isinstance(settings.sft_config["learning_rate"], float)
    assert num_rounds(JOB_CONFIGS / "peft_lora") == 3


def test_a_model_that_no_variable_names_is_refused(monkeypatch):
    for name in ("NVFLARE_LLM_MODEL", "NVFLARE_LLM_DATA"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="Set the environment variables NVFLARE_LLM_MODEL"):
        training_settings(JOB_CONFIGS / "sft", "dolly")


def test_a_folder_that_is_no_job_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a job folder .* Found 0"):
        num_rounds(tmp_path)
    with pytest.raises(ValueError, match="expected a workflow with `num_rounds`"):
        num_rounds(write_job(tmp_path, "server", {"workflows": []}))
    with pytest.raises(ValueError, match="expected an executor"):
        training_settings(write_job(tmp_path, "client", {"executors": []}), "site-1")


@pytest.mark.parametrize("name", ["", ".", "..", "/etc", "../other", "a/b", "a/", "a\x1b[2J"])
def test_an_app_is_a_folder_right_below_its_job(tmp_path: Path, name: str):
    (tmp_path / "job").mkdir()
    (tmp_path / "job/meta.json").write_text(json.dumps({"deploy_map": {name: ["@ALL"]}}))
    with pytest.raises(ValueError, match=r"deploy_map: expected names of apps.*found '[^\x1b]*'"):
        config_file(tmp_path / "job", "server")


@pytest.mark.parametrize("name", ["app", "app_server", "site 1.v2", "...", "größe"])
def test_any_plain_name_of_an_app_will_do(name: str):
    assert app_name(name) == name
