"""The recipe of docs/jobs.md, run as it stands there."""

import json
import re
from pathlib import Path

import pytest

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
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(example, {})
    assert json.loads((tmp_path / "jobs/mine/meta.json").read_text())["name"] == "mine"
    workspace = tmp_path / "workspaces" / "mine"
    assert_completed(Run(workspace, SITES, 0, ""), num_rounds=2)
    assert (workspace / "server/simulate_job/global_model/last/adapter_model.safetensors").is_file()
