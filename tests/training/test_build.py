"""What can't be trained is refused before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nvflare_llm_components.training.build import _sharding, build_trainer
from nvflare_llm_components.training.settings import TrainingSettings
from tests.training.conftest import NUM_ROWS, SFT


@pytest.mark.parametrize(
    ("sft", "words"),
    [
        ({"per_device_train_batch_size": NUM_ROWS + 1}, ["train_data", "11 rows", "found 10"]),
        ({"per_device_eval_batch_size": NUM_ROWS + 1}, ["eval_data", "11 rows", "found 10"]),
        (
            {
                "packing": True,
                "packing_strategy": "wrapped",
                "per_device_train_batch_size": 5,
                "max_length": 128,
            },
            ["train_data", "after packing"],
        ),
    ],
)
def test_fewer_rows_than_a_batch_that_must_be_full_are_refused(
    sft, words, model_folder: Path, data_file: Path, tmp_path: Path
):
    settings: dict[str, Any] = SFT | {"dataloader_drop_last": True} | sft
    with pytest.raises(ValueError, match="dataloader_drop_last") as caught:
        build_trainer(
            TrainingSettings(
                model_name_or_path=str(model_folder),
                train_data=data_file,
                eval_data=data_file,
                sft_config=settings,
            ),
            tmp_path,
        )
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("has_gpu", "sharding", "offload", "expected"),
    [
        (True, "full", "cpu", {"fsdp_size": 2, "fsdp_cpu_offload": True}),
        (True, "full", "none", {"fsdp_size": 2}),
        (False, "full", "cpu", {"fsdp_size": 2}),
        (True, "none", "none", None),
    ],
)
def test_parts_are_offloaded_where_there_is_a_gpu(
    has_gpu, sharding, offload, expected, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    settings = TrainingSettings(
        model_name_or_path="model",
        train_data=tmp_path / "rows.jsonl",
        num_processes=2,
        sharding=sharding,
        offload=offload,
    ).checked()
    assert _sharding(settings).get("distributed_config") == expected
