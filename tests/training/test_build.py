"""What can't be trained is refused before the first step."""

from pathlib import Path
from typing import Any

import pytest

from nvflare_llm_components.training.build import build_trainer
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
