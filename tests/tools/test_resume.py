import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext

from nvflare_llm_components.checkpoint.errors import CheckpointError
from nvflare_llm_components.checkpoint.snapshot import save_snapshot
from nvflare_llm_components.tools.resume import EarlierRunState, resume_job

JOBS = Path(__file__).parents[2] / "job_configs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a simulator that died in round 1 of 3 leaves behind."""
    run = tmp_path / "ws/server/simulate_job"
    shutil.copytree(JOBS / "sft/app", run / "app_server")
    (run / "meta.json").write_text(
        json.dumps({"name": "sft", "deploy_map": {"app": ["@ALL"]}, "min_clients": 2})
    )
    save(run, "last", 0)
    kept = tmp_path / "ws/dolly/simulate_job/trainer_state"
    kept.mkdir(parents=True)
    (kept / "state").touch()
    (tmp_path / "ws/alpaca/simulate_job").mkdir(parents=True)
    return run


def save(run: Path, name: str, number: int, **metrics: float) -> None:
    record = {"round": number, "metrics": metrics}
    save_snapshot(run / "global_model" / name, {"a": torch.ones(2)}, {}, record)


def server(job: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((job / "app/config/config_fed_server.json").read_text())
    return config


def component(config: dict[str, Any], name: str) -> dict[str, Any]:
    args: dict[str, Any] = next(c["args"] for c in config["components"] if c["id"] == name)
    return args


def test_the_job_continues_with_the_next_round_and_the_saved_model(run: Path, tmp_path: Path):
    save(run, "best", 0, eval_loss=1.5)
    said = resume_job(run, tmp_path / "job")
    config = server(tmp_path / "job")
    assert config["workflows"][0]["args"]["start_round"] == 1
    assert config["workflows"][0]["args"]["num_rounds"] == 2
    assert component(config, "persistor")["resume_from"] == str(run)
    assert component(config, "persistor")["model_name_or_path"] == "{model}"
    assert component(config, "earlier_run_state")["run_dir"] == str(run)
    client = json.loads((tmp_path / "job/app/config/config_fed_client.json").read_text())
    assert component(client, "earlier_run_state")["run_dir"] == f"{tmp_path}/ws/{{SITE_NAME}}/simulate_job"
    assert json.loads((tmp_path / "job/meta.json").read_text()) == {
        "name": "sft_resumed",
        "deploy_map": {"app": ["@ALL"]},
        "min_clients": 2,
    }
    assert "round 1, 2 to do" in said
    assert "Best so far: {'eval_loss': 1.5}" in said
    assert "dolly: goes on with trainer_state" in said
    assert "alpaca: optimizer, schedule and data order start afresh" in said


def test_a_job_can_be_continued_twice(run: Path, tmp_path: Path):
    resume_job(run, tmp_path / "job")
    shutil.rmtree(run / "app_server")
    shutil.copytree(tmp_path / "job/app", run / "app_server")
    save(run, "last", 1)
    resume_job(run, tmp_path / "again")
    config = server(tmp_path / "again")
    assert (
        config["workflows"][0]["args"] | {"start_round": 2, "num_rounds": 1} == config["workflows"][0]["args"]
    )
    assert [c["id"] for c in config["components"]].count("earlier_run_state") == 1


def test_the_master_is_gone_on_from_where_it_is_as_late(run: Path, tmp_path: Path):
    save(run, "master", 0)
    assert "global_model/master" in resume_job(run, tmp_path / "job")
    save(run, "last", 1)
    assert "global_model/last" in resume_job(run, tmp_path / "again")


def test_nothing_saved_begins_again(run: Path, tmp_path: Path):
    shutil.rmtree(run / "global_model")
    assert "No round was saved" in resume_job(run, tmp_path / "job")
    assert server(tmp_path / "job")["workflows"][0]["args"]["start_round"] == 0
    assert "resume_from" not in component(server(tmp_path / "job"), "persistor")


def test_a_finished_run_wants_to_know_how_many_rounds(run: Path, tmp_path: Path):
    save(run, "last", 2)
    with pytest.raises(ValueError, match="all 3 rounds are done"):
        resume_job(run, tmp_path / "job")
    resume_job(run, tmp_path / "more", num_rounds=5)
    assert server(tmp_path / "more")["workflows"][0]["args"]["num_rounds"] == 2


def test_a_damaged_model_is_not_continued(run: Path, tmp_path: Path):
    path = run / "global_model/last/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        resume_job(run, tmp_path / "job")


def test_several_apps_need_the_earlier_jobs_folder(run: Path, tmp_path: Path):
    deploy_map = {"app_a": ["server"], "app_b": ["dolly"]}
    (run / "meta.json").write_text(json.dumps({"deploy_map": deploy_map}))
    with pytest.raises(ValueError, match="Give the earlier job's folder"):
        resume_job(run, tmp_path / "job")
    resume_job(run, tmp_path / "job2", JOBS / "sft")
    assert server(tmp_path / "job2")["workflows"][0]["args"]["start_round"] == 1


def test_a_job_without_our_persistor_is_refused(run: Path, tmp_path: Path):
    file = run / "app_server/config/config_fed_server.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "components": []}))
    with pytest.raises(ValueError, match="found no persistor of ours"):
        resume_job(run, tmp_path / "job")


def test_a_site_takes_up_what_it_kept_and_says_what_it_lost(run: Path, tmp_path: Path, caplog):
    target = tmp_path / "new"
    target.mkdir()
    workspace = SimpleNamespace(get_run_dir=lambda job_id: str(target))
    context = FLContext()
    context.set_prop(
        "__engine__", SimpleNamespace(get_workspace=lambda: workspace), private=True, sticky=True
    )
    context.set_prop(FLContextKey.CURRENT_RUN, "job", private=True, sticky=True)
    with caplog.at_level("INFO"):
        EarlierRunState(run_dir=str(tmp_path / "ws/dolly/simulate_job")).handle_event(
            EventType.START_RUN, context
        )
    assert (target / "trainer_state/state").exists()
    assert "filter_state: the earlier run left none" in caplog.text
