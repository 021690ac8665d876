"""Adapters over 4-bit bases in a real job, with a server that can't import bitsandbytes."""

from pathlib import Path

import pytest
import torch

from tests.integration.simulator import NUM_ROUNDS, SITES, assert_completed, copy_job, simulate
from tests.training.conftest import needs_bitsandbytes

pytestmark = [pytest.mark.integration, pytest.mark.slow, needs_bitsandbytes]
NOT_AT_THE_SERVER = """
import sys
if not any("simulator_worker" in word for word in sys.orig_argv):
    sys.modules["bitsandbytes"] = None
"""


def test_only_sites_need_bitsandbytes(tmp_path: Path, model: Path, data: Path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first/sitecustomize.py").write_text(NOT_AT_THE_SERVER)
    here = f"{tmp_path / 'first'}:{Path(__file__).parents[2]}"
    size = {"num_clients": len(SITES), "num_rounds": NUM_ROUNDS}
    job = copy_job("peft_qlora", tmp_path / "job", server=size)
    run = simulate(
        job, tmp_path / "run", sites=SITES, model=model, data=data, environment={"PYTHONPATH": here}
    )
    assert_completed(run, num_rounds=NUM_ROUNDS)
    weights = run.weights()
    assert all("lora_" in name for name in weights)
    assert any(torch.count_nonzero(value) for name, value in weights.items() if "lora_B" in name)
    assert {value.dtype for value in weights.values()} == {torch.float32}
