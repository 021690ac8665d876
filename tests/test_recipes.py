"""The recipe exports what ``nvflare-llm job`` writes, and what is added to it by FLARE's own methods."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from nvflare.recipe.poc_env import PocEnv
from nvflare.recipe.sim_env import SimEnv

from nvflare_llm_components.jobs.read import resolved
from nvflare_llm_components.jobs.shipped import SHIPPED
from nvflare_llm_components.jobs.write import chosen, write_job
from nvflare_llm_components.recipes import HFSFTRecipe
from nvflare_llm_components.tools.shell import CommandError


def files(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def written(folder: Path, start: str, given: dict[str, Any]) -> Path:
    write_job(chosen(start, given), folder / "hf_sft")
    return folder / "hf_sft"


def exported(folder: Path, recipe: HFSFTRecipe) -> Path:
    recipe.export(str(folder))
    return folder / recipe.name


def client(job: Path) -> dict[str, Any]:
    return json.loads((job / "app/config/config_fed_client.json").read_text())


@pytest.mark.parametrize("start", SHIPPED)
def test_each_shipped_job_is_exported_to_the_byte(start: str, tmp_path: Path):
    expected = files(written(tmp_path / "written", start, {}))
    found = files(exported(tmp_path / "exported", HFSFTRecipe(start)))
    assert found.keys() == expected.keys()
    for name in ("app/config/config_fed_server.json", "app/config/config_fed_client.json"):
        assert found[name] == expected[name]
    assert json.loads(found["meta.json"]) == json.loads(expected["meta.json"])


def test_choices_are_those_of_the_command(tmp_path: Path):
    given = {"rounds": 7, "precision": "int8", "lora": {"r": 16}, "quorum": 2, "sites": "a,b,c", "lr": 1e-5}
    expected = written(tmp_path / "written", "sft", given)
    found = exported(tmp_path / "exported", HFSFTRecipe(**given | {"sites": ["a", "b", "c"]}))
    assert {name: json.loads(text) for name, text in files(found).items()} == {
        name: json.loads(text) for name, text in files(expected).items()
    }


def test_a_site_with_settings_of_its_own_reads_the_same(tmp_path: Path):
    given: dict[str, Any] = {"sites": "a,b,c", "per_site": {"c": {"batch_size": 1, "lr": 1e-6}}}
    expected = written(tmp_path / "written", "sft", given)
    later = HFSFTRecipe(sites="a,b,c")
    later.set_per_site_config({"a": {}, "c": given["per_site"]["c"]})
    for number, recipe in enumerate([HFSFTRecipe(**given), later]):
        found = exported(tmp_path / str(number), recipe)
        assert resolved(found, "server") == resolved(expected, "server")
        for site in ("a", "b", "c"):
            assert resolved(found, "client", site) == resolved(expected, "client", site)
    assert resolved(expected, "client", "c")["batch_size"] == 1


def test_a_server_with_an_app_of_its_own_knows_what_sites_send(tmp_path: Path):
    """Its gate reads that beside its own configuration, and takes differences for a lie otherwise."""
    recipe = HFSFTRecipe("sft_nf4", sites=["a", "b"], per_site={"b": {"lr": 1e-6}})
    job = exported(tmp_path, recipe)
    beside = json.loads((job / "app_server/config/config_fed_client.json").read_text())
    assert beside["executors"][0]["executor"]["args"]["params_type"] == "DIFF"


def test_no_file_of_ours_is_in_the_job(tmp_path: Path):
    recipe = HFSFTRecipe()
    recipe.enable_log_streaming("log.txt")
    job = exported(tmp_path, recipe)
    assert not list(job.rglob("*.py"))
    assert not list(job.rglob("custom"))


def test_what_is_added_stands_behind_what_was_chosen(tmp_path: Path):
    plain = client(exported(tmp_path / "plain", HFSFTRecipe()))
    recipe = HFSFTRecipe()
    recipe.enable_log_streaming("log.txt")
    recipe.add_client_config({"get_task_timeout": 60})
    found = client(exported(tmp_path / "added", recipe))
    assert found["components"][:-1] == plain["components"]
    assert found["components"][-1]["path"].endswith("JobLogStreamer")
    assert found == plain | {"components": found["components"], "get_task_timeout": 60}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"start": "nothing"}, "start: expected one of"),
        ({"colour": "red"}, "colour: expected one of"),
        ({"rounds": "many"}, "rounds: expected int"),
        ({"sites": ["a", "../b"]}, "sites: expected a number"),
        ({"executor": {"params_type": "DIFF"}}, r"executor.params_type: expected one of"),
    ],
)
def test_choices_that_give_no_job_are_refused_at_once(given: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        HFSFTRecipe(**given)


def test_a_site_that_the_job_does_not_have_gets_no_settings():
    with pytest.raises(ValueError, match="per_site: expected one of the sites"):
        HFSFTRecipe(sites=2).set_per_site_config({"site-3": {"lr": 1.0}})


@pytest.mark.parametrize(
    ("choices", "env"),
    [
        ({}, {"num_clients": 2}),
        ({"sites": "a,b"}, {"num_clients": 2}),
        ({"sites": "a,b"}, {"clients": ["a"]}),
    ],
)
def test_an_environment_without_the_sites_is_refused(choices: dict[str, Any], env: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="SimEnv: expected the sites of the job"):
        HFSFTRecipe(**choices).run(SimEnv(workspace_root=str(tmp_path), **env))
    assert not list(tmp_path.iterdir())


def test_counted_sites_of_a_simulator_cannot_have_their_own_settings(tmp_path: Path):
    recipe = HFSFTRecipe(per_site={"site-1": {"lr": 1e-6}})
    with pytest.raises(ValueError, match=r"'site-2', 'site-3'\], num_clients=3\. Found num_clients=3"):
        recipe.run(SimEnv(workspace_root=str(tmp_path), num_clients=3))


def allowed(site: Path) -> list[str]:
    return json.loads((site / "local/resources.json").read_text())["class_allow_list"]


def test_a_simulated_job_that_leaves_nothing_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NVFLARE_LLM_MODEL", "/kept")
    monkeypatch.delenv("NVFLARE_LLM_DATA", raising=False)
    recipe = HFSFTRecipe("sft_fedopt", model="/model", data="/data", also_allow=["torch.optim.Adam"])
    recipe.process_env(SimEnv(workspace_root=str(tmp_path), num_clients=3))
    assert (os.environ["NVFLARE_LLM_MODEL"], os.environ["NVFLARE_LLM_DATA"]) == ("/kept", "/data")
    monkeypatch.setattr("nvflare.job_config.fed_job_config.subprocess.Popen", Simulator)
    with pytest.raises(CommandError, match="site-1: expected 3 rounds"):
        recipe.run(SimEnv(workspace_root=str(tmp_path), num_clients=3))
    entries = allowed(tmp_path / "hf_sft")
    assert "nvflare_llm_components.executors.HFSFTExecutor" in entries
    assert {"torch.optim.SGD", "torch.optim.Adam"} <= set(entries)


class Simulator:
    """FLARE's simulator, when all its clients have died."""

    def __init__(self, command: list[str], **_: Any):
        assert Path(command[3], "meta.json").is_file()

    def wait(self) -> int:
        return 0


def test_a_new_poc_allows_our_classes_when_it_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NVFLARE_POC_WORKSPACE", str(tmp_path))
    recipe = HFSFTRecipe(sites=2)
    recipe.process_env(PocEnv(num_clients=2))
    kit = tmp_path / "project/prod_00/site-1"
    (kit / "startup").mkdir(parents=True)
    (kit / "startup/fed_client.json").write_text("{}")
    exported(tmp_path / "job", recipe)
    assert "nvflare_llm_components.executors.HFSFTExecutor" in allowed(kit)
