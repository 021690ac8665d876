"""The recipe in FLARE's environments: that of docs/jobs.md as it stands there, POC, and a deployment."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from nvflare.recipe.poc_env import PocEnv
from nvflare.recipe.prod_env import ProdEnv

from nvflare_llm_components.recipes import HFSFTRecipe
from tests.integration.deployment import free_port, project
from tests.integration.simulator import SITES, Run, assert_completed

pytestmark = pytest.mark.integration
PAGE = Path(__file__).parents[2] / "docs" / "jobs.md"


def test_the_example_of_the_page_runs_in_the_simulator(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {
        "NVFLARE_LLM_MODEL": str(model),
        "NVFLARE_LLM_DATA": str(data),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    example, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(example, {})
    assert json.loads((tmp_path / "jobs/mine/meta.json").read_text())["name"] == "mine"
    workspace = tmp_path / "workspaces" / "mine"
    assert_completed(Run(workspace, SITES, 0, ""), num_rounds=2)
    assert (workspace / "server/simulate_job/global_model/last/adapter_model.safetensors").is_file()


@pytest.fixture
def at_home(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a POC workspace of this test's own; FLARE keeps its settings at home."""
    for name, value in {
        "NVFLARE_LLM_MODEL": str(model),
        "NVFLARE_LLM_DATA": str(data),
        "HOME": str(tmp_path / "home"),
        "NVFLARE_POC_WORKSPACE": str(tmp_path / "poc"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # the kits call python3
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")  # FLARE's connector runs in this process, in threads of its own
def test_the_recipe_runs_in_a_poc_and_is_submitted_to_a_deployment(at_home: Path):
    project_file = at_home / "project.yml"
    project_file.write_text(project(SITES, free_port(), {}))
    recipe = HFSFTRecipe("peft_lora_int8", name="mine", sites=SITES, rounds=2)
    poc = PocEnv(
        clients=SITES, num_clients=2, project_conf_path=str(project_file), extra={"login_timeout": 60}
    )
    try:
        run = recipe.run(poc)
        kit = at_home / "poc/example_project/prod_00/admin@nvidia.com"
        later = HFSFTRecipe("sft_int8", name="later", sites=SITES, rounds=2)
        submitted = later.run(ProdEnv(str(kit), login_timeout=60))
        results = [each.get_result(timeout=300, clean_up=False) for each in (submitted, run)]
        assert [each.get_status() for each in (submitted, run)] == ["FINISHED:COMPLETED"] * 2
        whole, adapter = (Path(result or "", "workspace/global_model/last") for result in results)
        assert (whole / "model.safetensors").is_file()
        assert (adapter / "adapter_model.safetensors").is_file()
    finally:
        poc.stop(clean_up=True)
