"""nf4 in both directions, with error feedback: an eighth of the bytes, and the loss stays close."""

from pathlib import Path

import pytest

from tests.integration.simulator import NUM_ROUNDS, SITES, Run, assert_completed, global_losses, run_job

pytestmark = pytest.mark.integration


def assert_small(run: Run) -> None:
    for site in SITES:
        for record in run.records(site, "traffic", operation="quantize", task="train"):
            assert record["precision"] == "nf4"
            assert record["bytes_after"] <= 0.2 * record["bytes_before"]  # a tiny model: its norms stay fp32


def test_nf4_stays_close_to_fp32(sft: Run, tmp_path: Path, model: Path, data: Path):
    run = run_job("sft_nf4", tmp_path, model=model, data=data)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    assert_small(run)
    for site in SITES:
        assert global_losses(run, site)[-1] == pytest.approx(global_losses(sft, site)[-1], rel=0.02)


def test_lora_nf4_completes(tmp_path: Path, model: Path, data: Path):
    run = run_job("peft_lora_nf4", tmp_path, model=model, data=data)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    assert_small(run)
