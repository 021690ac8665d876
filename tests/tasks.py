"""What the tests of the executor send, and what they read from its replies."""

from pathlib import Path
from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from safetensors.torch import load_file

from nvflare_llm_components.flare.headers import ERROR_HEADER

SFT = {"per_device_train_batch_size": 4, "logging_steps": 1, "max_length": 64, "learning_rate": 1e-2}
NUM_ROWS = 10
NUM_ROUNDS = 2
LAST_ROUND = NUM_ROUNDS - 1


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def task(data: dict[str, Any], round_number: int = 0, **meta: Any) -> Shareable:
    shareable = DXO(DataKind.WEIGHTS, data=data, meta=meta).to_shareable()
    shareable.set_header(AppConstants.CURRENT_ROUND, round_number)
    shareable.set_header(AppConstants.NUM_ROUNDS, NUM_ROUNDS)
    return shareable


def result(reply: Shareable) -> DXO:
    assert reply.get_return_code() == ReturnCode.OK, reply.get_header(ERROR_HEADER)
    return from_shareable(reply)
