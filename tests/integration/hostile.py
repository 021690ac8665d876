"""Sites that train as the others do and then send something else."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nvflare.apis.dxo import DXO, MetaKey, from_shareable
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from nvflare_llm_components.executors import HFSFTExecutor


class _ForgingExecutor(HFSFTExecutor):
    """Sends a forgery of its own result in each round."""

    forgeries: Sequence[Callable[[DXO], None]] = ()

    def execute(self, task_name: str, shareable: Shareable, *context: Any) -> Shareable:
        reply = super().execute(task_name, shareable, *context)
        if task_name != AppConstants.TASK_TRAIN:
            return reply
        forged = from_shareable(reply)
        self.forgeries[shareable.get_header(AppConstants.CURRENT_ROUND)](forged)
        return forged.update_shareable(reply)


def _overweight(dxo: DXO) -> None:
    dxo.meta[MetaKey.NUM_STEPS_CURRENT_ROUND] = 1e30
    dxo.data = {name: torch.full_like(value, 7.0) for name, value in dxo.data.items()}


def _broadcasting(dxo: DXO) -> None:
    name = next(name for name, value in dxo.data.items() if value.dim() == 1)
    dxo.data[name] = torch.zeros(1)


def _perfect(dxo: DXO) -> None:
    dxo.meta[MetaKey.INITIAL_METRICS] = {"eval_loss": -1e30}


def _diverged(dxo: DXO) -> None:
    dxo.data = {name: torch.full_like(value, torch.nan) for name, value in dxo.data.items()}


class HostileExecutor(_ForgingExecutor):
    """Sends a weight of 1e30, then a shape that broadcasts, then a loss of -1e30."""

    forgeries = (_overweight, _broadcasting, _perfect)


class DivergingExecutor(_ForgingExecutor):
    """Sends what it trained in the first round, and NaN in the second."""

    forgeries = (lambda dxo: None, _diverged)
