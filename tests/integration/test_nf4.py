"""nf4 and int2 in both directions, with error feedback: few bytes, and the loss stays close."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.simulator import NUM_ROUNDS, SITES, Run, assert_completed, global_losses, run_job

pytestmark = pytest.mark.integration


def assert_small(run: Run, precision: str = "nf4") -> None:
    for site in SITES:
        for record in run.records(site, "traffic", operation="quantize", task="train"):
            assert record["precision"] == precision
            assert record["bytes_after"] <= 0.2 * record["bytes_before"]  # a tiny model: its norms stay fp32


def assert_taken(run: Run) -> None:
    """FLARE told of each result that it was aggregated (it keeps two), so no site dropped a residual."""
    taken = json.loads((run.run_dir("server") / "filter_state" / "taken.json").read_text())
    assert taken == {site: list(range(NUM_ROUNDS))[-2:] for site in SITES}
    for site in SITES:
        assert "dropped the residuals" not in run.log(site)


@pytest.mark.parametrize("precision", ["nf4", "int2"])
def test_it_stays_close_to_fp32(sft: Run, tmp_path: Path, model: Path, data: Path, precision: str):
    def change(config: dict[str, Any]) -> None:
        config["precision"] = precision

    run = run_job("sft_nf4", tmp_path, model=model, data=data, server=change, client=change)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    assert_small(run, precision)
    assert_taken(run)
    for site in SITES:
        assert global_losses(run, site)[-1] == pytest.approx(global_losses(sft, site)[-1], rel=0.03)


def test_lora_nf4_completes(tmp_path: Path, model: Path, data: Path):
    run = run_job("peft_lora_nf4", tmp_path, model=model, data=data)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    assert_small(run)
