"""Precision filters in the real simulator: four bits both ways over process restarts, and disk offload."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import SITES
from tests.integration.simulator import assert_completed, copy_job, executor_args, global_losses, simulate

pytestmark = pytest.mark.integration

NUM_ROUNDS = 2
SERVER = {"num_clients": len(SITES), "num_rounds": NUM_ROUNDS}


def send_updates(config: dict[str, Any]) -> None:
    executor_args(config)["params_type"] = "DIFF"
    config["precision"] = "nf4"
    config["task_result_filters"][0]["filters"][0]["args"]["error_feedback"] = True


def test_four_bits_both_ways_with_a_new_process_for_each_task(tmp_path: Path, model: Path, data: Path):
    job = copy_job("sft_int8", tmp_path / "job", server=SERVER | {"precision": "nf4"}, client=send_updates)
    run = simulate(job, tmp_path / "workspace", sites=SITES, model=model, data=data, threads=1)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    assert all("SlicedTensors" in run.log(site) for site in ["server", *SITES])  # FLARE names what it sends
    shadows = [
        load_file(run.run_dir(site) / "filter_state/shadow.safetensors") for site in ["server", *SITES]
    ]
    for name, shadow in shadows[0].items():
        assert all(torch.equal(shadow, other[name]) for other in shadows[1:]), name
    for site in SITES:
        losses = global_losses(run, site)
        assert losses[-1] < losses[0]
        assert (run.run_dir(site) / f"filter_state/residual_{NUM_ROUNDS - 1}.safetensors").is_file()
        assert "dropped the residual" not in run.log(site)
        received = run.records(site, "traffic", operation="dequantize", task="train")
        assert ["nf4" in record["bytes_by_precision"] for record in received] == [False, True]
        for record in run.records(site, "traffic", operation="quantize", task="train"):
            assert record["bytes_after"] < 0.2 * record["bytes_before"]  # a tiny model: its norms stay fp32


def test_disk_offload_averages_quantized_results_from_disk(tmp_path: Path, model: Path, data: Path):
    def offload(config: dict[str, Any]) -> None:
        config.update(SERVER)
        config["workflows"][0]["args"]["enable_tensor_disk_offload"] = True

    job = copy_job("sft_int8", tmp_path / "job", server=offload)
    run = simulate(job, tmp_path / "workspace", sites=SITES, model=model, data=data)
    assert_completed(run, num_rounds=NUM_ROUNDS)
    assert all(value.is_floating_point() and value.isfinite().all() for value in run.weights().values())
    assert global_losses(run, SITES[0])[-1] < global_losses(run, SITES[0])[0]
