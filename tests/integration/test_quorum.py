"""A real job that goes on without a site that can't train, and one that ends since too few are left."""

from pathlib import Path

import pytest

from tests.integration.simulator import Run, copy_job, simulate
from tests.tiny import write_site_data

SITES = ["dolly", "alpaca", "broken"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_site_data(tmp_path_factory.mktemp("data"), SITES[:2], num_rows=16)


def run(folder: Path, model: Path, data: Path, quorum: int) -> Run:
    settings = {"num_clients": 3, "num_rounds": 2, "quorum": quorum, "grace_s": 120}
    job = copy_job("sft_int8", folder / "job", server=settings)
    return simulate(job, folder / "workspace", sites=SITES, model=model, data=data)


def assert_told(done: Run, found: str) -> None:
    lines = [line for line in done.log("server").splitlines() if found in line and "of 3 sites" in line]
    assert any(
        "Site 'broken' failed:" in line and "train_data: expected a data file" in line for line in lines
    )


def assert_rounds_told(done: Run) -> None:
    rounds = done.records("server", "rounds")
    assert [(r["round"], r["num_rounds"], r["missing"]) for r in rounds] == [
        (0, 2, ["broken"]),
        (1, 2, ["broken"]),
    ]
    received = done.records("server", "traffic", operation="dequantize", round=1)
    assert rounds[1]["bytes_in"] == sum(r["bytes_before"] for r in received) > 0
    losses = [done.records(site, kind="eval")[1]["eval_loss"] for site in ("alpaca", "dolly")]
    assert min(losses) <= rounds[1]["eval_loss"] <= max(losses)
    assert "Round 2 of 2: 2 of 3 sites, missing broken, eval loss" in done.log("server")


@pytest.mark.integration
def test_the_job_goes_on_without_a_site_that_fails_each_round(tmp_path, model, data):
    done = run(tmp_path, model, data, quorum=2)
    assert done.exit_code == 0, done.output[-4000:]
    assert done.final_round() == 1
    assert done.federation()["parents"]["sites"] == ["alpaca", "dolly"]
    assert_told(done, "Round 1: results from 2 of 3 sites.")
    assert_rounds_told(done)


@pytest.mark.integration
def test_the_job_ends_and_says_why_when_the_quorum_is_out_of_reach(tmp_path, model, data):
    done = run(tmp_path, model, data, quorum=3)
    assert done.exit_code == 2
    assert not done.model_dir().exists()
    assert_told(done, "Round 0: results from ")
    assert "Expected at least 3 (quorum)" in done.log("server")
