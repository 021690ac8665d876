"""A message that takes ten minutes one way, over a real line of 10 Mbit/s, with the shipped settings."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.deployment import deployed, records
from tests.integration.simulator import copy_job, executor_args, variables_of
from tests.tiny import save_tiny_model, write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(4000)]
SITE = "site-1"
MEGABIT = 1e6
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2888,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def test_758_megabytes_at_10_megabits(tmp_path: Path):
    model = save_tiny_model(tmp_path / "model", **SHAPE)
    data = write_site_data(tmp_path / "data", [SITE], num_rows=4)

    def one_round(config: dict[str, Any]) -> None:
        config |= {"num_clients": 1, "num_rounds": 1}
        config["workflows"] = config["workflows"][:1]  # an evaluation would send it again

    job = copy_job(
        "sft",
        tmp_path / "job",
        server=one_round,
        client=lambda config: executor_args(config).update(local_steps=1, local_epochs=None),
    )
    with deployed(tmp_path, [SITE], variables_of(model, data), {SITE: 10 * MEGABIT}) as poc:
        began = time.monotonic()
        job_id = poc.submit(job)
        assert poc.ending(job_id, seconds=3600) == "FINISHED:COMPLETED"
        seconds = time.monotonic() - began
        ledger = (poc.run_dir(SITE, job_id) / "traffic.jsonl").read_text().splitlines()
        sent = [json.loads(line) for line in ledger if '"quantize"' in line]
        (size,) = [record["bytes_after"] for record in sent]
        assert 750e6 < size < 770e6
        passed = poc.lines[SITE].num_bytes
        print(f"{size:,} bytes a message, {passed:,} over the line, {seconds:.0f} s")
        assert passed < 2.1 * size, "nothing travelled twice"
        assert seconds > 2 * size * 8 / (10 * MEGABIT)
        assert [record["round"] for record in records(poc.run_dir(SITE, job_id), "round")] == [0]
        assert (poc.download(job_id, tmp_path) / "workspace/global_model/last/model.safetensors").is_file()
