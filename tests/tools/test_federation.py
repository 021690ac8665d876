import io
from pathlib import Path

import pytest
from rich.console import Console

from nvflare_llm_components.tools.federation import check, simulate
from nvflare_llm_components.tools.shell import CommandError, Shell
from tests.tiny import save_tiny_model, write_site_data

JOB = Path(__file__).parents[2] / "job_configs/sft"


@pytest.mark.integration
def test_a_job_that_fails_at_one_site_is_told_with_its_cause(tmp_path, monkeypatch):
    sites = ["a", "b", "c"]
    places = {
        "NVFLARE_LLM_MODEL": str(save_tiny_model(tmp_path / "model")),
        "NVFLARE_LLM_DATA": str(write_site_data(tmp_path / "data", sites)),
    }
    (tmp_path / "data/b/training.jsonl").unlink()
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    shell = Shell(Console(file=io.StringIO()), places | {"OMP_NUM_THREADS": "1"}, timeout_s=300)
    with pytest.raises(CommandError, match=r"data/b/training\.jsonl") as error:
        simulate(shell, JOB, tmp_path / "ws", sites)
    assert "ws/b/log.txt" in str(error.value)
    last = str(error.value).splitlines()[-1]
    assert last.startswith("site b: train_data: expected a data file")


@pytest.mark.parametrize("owner", ["server", "site-2"])
def test_the_last_model_is_the_server_s_or_in_swarm_a_site_s(tmp_path, owner):
    last = tmp_path / owner / "simulate_job" / "global_model" / "last"
    last.mkdir(parents=True)
    (last / "federation.json").write_text('{"round": 1}')
    check(tmp_path, [], rounds=2)
    with pytest.raises(CommandError, match="expected the model of round 2"):
        check(tmp_path, [], rounds=3)
