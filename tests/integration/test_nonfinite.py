"""A site whose training diverges, where all are needed: the job ends with its name, the good model stays."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nvflare_llm_components.checkpoint.manifest import verify_files
from tests.integration.simulator import SITES, copy_job, edit, executor_args, simulate

pytestmark = pytest.mark.integration

DIVERGING, SOUND = SITES
EXECUTOR = "tests.integration.hostile.DivergingExecutor"


def one_step_a_round(config: dict[str, Any]) -> None:
    executor_args(config).update(local_epochs=None, local_steps=1, checkpoint="always")


def diverge_after_the_first_round(config: dict[str, Any]) -> None:
    config["executors"][0]["executor"]["path"] = EXECUTOR


def diverging_job(folder: Path) -> Path:
    """The job `sft_int8` with an app of its own for the site that diverges."""
    job = copy_job("sft_int8", folder, server={"num_clients": 2, "num_rounds": 3}, client=one_step_a_round)
    shutil.copytree(job / "app", job / "app_diverging")
    edit(job / "app_diverging/config/config_fed_client.json", diverge_after_the_first_round)
    apps = {"app": ["server", SOUND], "app_diverging": [DIVERGING]}
    edit(job / "meta.json", lambda meta: meta.update(deploy_map=apps))
    return job


def test_the_job_fails_with_the_sites_name_and_the_last_good_model_stays(
    tmp_path: Path, model: Path, data: Path
):
    run = simulate(
        diverging_job(tmp_path / "job"),
        tmp_path / "ws",
        sites=SITES,
        model=model,
        data=data,
        also_allow=[EXECUTOR],
        environment={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.exit_code != 0
    errors = [line for line in run.log("server").splitlines() if "NaN or Inf in" in line]
    assert any(
        f"Round 1: the result of site '{DIVERGING}' for task 'train' is refused" in line for line in errors
    )
    assert not any(f"site '{SOUND}'" in line for line in errors)
    assert "Round 2 started" not in run.log("server")
    verify_files(run.model_dir())
    assert run.final_round() == 0
    assert all(torch.isfinite(value).all() for value in run.weights().values())
    assert not [path for path in run.model_dir().parent.iterdir() if path.name.startswith(".")]
    for site in SITES:  # a resumed job goes on with them
        assert list(run.run_dir(site).glob("trainer_state/step-*")), site
