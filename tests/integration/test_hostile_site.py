"""One hostile site among two honest ones, in FLARE's real simulator."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.simulator import Run, copy_job, edit, simulate
from tests.tiny import write_site_data

pytestmark = pytest.mark.integration

HOSTILE, HONEST = "hostile", ["alpaca", "dolly"]
EXECUTOR = "tests.integration.hostile.HostileExecutor"
ROOT = Path(__file__).parents[2]
REFUSED = [
    "expected a weight above 0 and up to 1e+09 in the average, found 1e+30",
    "of shape (32,), found (1,)",
    "expected metric 'eval_loss' to be a number from 0 to 10000, found -1e+30",
]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Run:
    folder = tmp_path_factory.mktemp("attacked")

    def resilient(config: dict[str, Any]) -> None:
        config.update(num_clients=3, num_rounds=3)
        config["workflows"][0]["args"].update(quorum=2, grace_s=120)

    job = copy_job("sft_int8", folder / "job", server=resilient)
    shutil.copytree(job / "app", job / "app_hostile")
    change = lambda config: config["executors"][0]["executor"].update(path=EXECUTOR)  # noqa: E731
    edit(job / "app_hostile/config/config_fed_client.json", change)
    apps = {"app": ["server", *HONEST], "app_hostile": [HOSTILE]}
    edit(job / "meta.json", lambda meta: meta.update(deploy_map=apps))
    data = write_site_data(folder / "data", [HOSTILE, *HONEST], num_rows=8)
    return simulate(
        job,
        folder / "workspace",
        sites=[HOSTILE, *HONEST],
        model=model,
        data=data,
        also_allow=[EXECUTOR],
        environment={"PYTHONPATH": str(ROOT)},
    )


def test_its_results_are_refused_by_name_and_the_job_goes_on_without_them(attacked: Run):
    assert attacked.exit_code == 0, attacked.output[-4000:]
    log = attacked.log("server").splitlines()
    refused = [line for line in log if "is refused:" in line and " - ERROR - " in line]
    assert len(refused) == len(REFUSED)
    for number, (line, reason) in enumerate(zip(refused, REFUSED, strict=True)):
        assert f"Round {number}: the result of site '{HOSTILE}' for task 'train' is refused" in line
        assert reason in line
    assert attacked.final_round() == 2
    assert attacked.federation()["parents"]["sites"] == HONEST


def test_nothing_of_them_is_in_model_or_metrics(attacked: Run):
    for record in attacked.records("server", "rounds"):
        assert record["missing"] == [HOSTILE]
        assert 0 < record["eval_loss"] < 10
    assert 0 < attacked.federation("best")["metrics"]["eval_loss"] < 10
    assert max(float(value.abs().max()) for value in attacked.weights().values()) < 5
