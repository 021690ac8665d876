import json
from pathlib import Path
from typing import Any

import pytest

from nvflare_llm_components.tools import continued
from nvflare_llm_components.tools.continued import Rounds

JOBS = Path(__file__).parents[2] / "job_configs"
WORKFLOWS = "nvflare.app_common.workflows"
PLACE = "/earlier"


def server(job: str = "sft") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((JOBS / job / "app/config/config_fed_server.json").read_text())
    return content


def with_rounds(value: Any) -> dict[str, Any]:
    config = server()
    config["workflows"][0]["args"]["num_rounds"] = value
    return config


def test_rounds_are_found_where_flare_finds_them(monkeypatch):
    assert continued.rounds_of(server()) == Rounds(0, 3)
    assert continued.rounds_of(with_rounds(7)) == Rounds(0, 7)
    monkeypatch.setenv("ROUNDS", "9")
    assert continued.rounds_of(with_rounds("{$ROUNDS}")) == Rounds(0, 9)
    assert continued.rounds_of(with_rounds("{num_rounds}") | {"num_rounds": "{$ROUNDS}"}) == Rounds(0, 9)


def test_what_the_run_recorded_counts_more_than_this_machines_environment(monkeypatch):
    monkeypatch.setenv("ROUNDS", "9")
    assert continued.rounds_of(with_rounds("{$ROUNDS}"), recorded=20) == Rounds(0, 20)
    assert continued.rounds_of(with_rounds(7), recorded=20) == Rounds(0, 7)


@pytest.mark.parametrize("value", ["{$NOWHERE}", "{nowhere}", "{loop}", None, True, "many"])
def test_rounds_that_can_not_be_told_are_asked_for(value: Any):
    config = with_rounds(value) | {"loop": "{loop}"}
    with pytest.raises(ValueError, match="--rounds"):
        continued.rounds_of(config)


@pytest.mark.parametrize(
    ("path", "default"),
    [
        (f"{WORKFLOWS}.fedavg.FedAvg", 5),
        (f"{WORKFLOWS}.scatter_and_gather.ScatterAndGather", 5),
        (f"{WORKFLOWS}.cyclic.Cyclic", 5),
        (f"{WORKFLOWS}.scaffold.Scaffold", 5),
    ],
)
def test_rounds_that_are_left_out_are_the_workflows_own_default(path: str, default: int):
    config = server()
    config["workflows"] = [{"id": "w", "path": path}]
    assert continued.rounds_of(config) == Rounds(0, default)
    continued.continue_server(config, Rounds(2, default - 2), PLACE)
    assert config["workflows"][0]["args"] == {"start_round": 2, "num_rounds": default - 2}


@pytest.mark.parametrize(
    "path", [f"{WORKFLOWS}.cyclic_ctl.CyclicController", f"{WORKFLOWS}.cross_site_eval.CrossSiteEval"]
)
def test_a_workflow_that_begins_at_zero_is_refused(path: str):
    config = server()
    config["workflows"] = [{"id": "w", "path": path, "args": {"num_rounds": 3}}]
    with pytest.raises(ValueError, match="can't begin in the middle"):
        continued.rounds_of(config)


def test_the_jobs_own_workflow_is_believed():
    config = server()
    config["workflows"] = [{"id": "w", "path": "mine.Workflow", "args": {"num_rounds": 3, "start_round": 1}}]
    assert continued.rounds_of(config) == Rounds(1, 3)


def test_fedopts_model_goes_on_with_the_persistors():
    config = server("sft_fedopt")
    continued.continue_server(config, Rounds(1, 2), PLACE)
    for path in (continued.PERSISTOR, continued.MODULE):
        (component,) = continued.components_of(config, path)
        assert component["args"]["resume_from"] == PLACE


def test_no_site_is_asked_for_its_weights_again():
    config = server("sft_initialize_weights")
    continued.continue_server(config, Rounds(1, 2), PLACE)
    assert [workflow["id"] for workflow in config["workflows"]] == ["scatter_and_gather", "final_evaluation"]
    (persistor,) = continued.components_of(config, continued.PERSISTOR)
    assert persistor["args"] == {"model_name_or_path": "{model}", "resume_from": PLACE}
    config = server("sft_initialize_weights")
    continued.continue_server(config, Rounds(0, 3), None)
    assert [workflow["id"] for workflow in config["workflows"]] == [
        "initialize",
        "scatter_and_gather",
        "final_evaluation",
    ]


def test_a_job_without_our_persistor_is_refused():
    with pytest.raises(ValueError, match="found no persistor of ours"):
        continued.continue_server(server() | {"components": []}, Rounds(1, 2), PLACE)


@pytest.mark.parametrize("job", sorted(folder.name for folder in JOBS.iterdir() if folder.is_dir()))
def test_each_shipped_job_is_continued_or_says_why_not(job: str):
    config = server(job)
    if job in ("sft_cyclic", "sft_swarm"):
        with pytest.raises(ValueError, match="can't be"):
            continued.continue_server(config, Rounds(1, 2), PLACE)
        return
    continued.continue_server(config, continued.rounds_of(config), PLACE)
    assert continued.earlier_model_of(config) == PLACE


def test_a_path_with_flares_variables(tmp_path: Path):
    place = continued.resolved_path("{WORKSPACE}/{JOB_ID}/app_server/{other}", tmp_path / "id", "server")
    assert place == tmp_path / "id/app_server/{other}"
