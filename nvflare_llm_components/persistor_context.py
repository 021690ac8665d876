"""What a result and its context tell the persistor."""

import math
from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_llm_components.memory import give_back

KEY_METRIC = "eval_loss"


def tensor_of(value: Any) -> torch.Tensor:
    """What a state dict holds as a tensor: it may be NumPy's, or still encoded."""
    tensor: torch.Tensor = torch.as_tensor(value.materialize() if hasattr(value, "materialize") else value)
    return tensor


def loss_of(result: Any) -> float | None:
    """The loss in a validation's result; None for a failed task, or one without."""
    try:
        loss = from_shareable(result).data.get(KEY_METRIC)
    except (ValueError, AttributeError):  # a failed task, or no metrics
        return None
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def weights_of(result: Shareable) -> DXO | None:
    """The weights, or their change, that a site sent; None where its result holds no such thing."""
    try:
        dxo = from_shareable(result)
    except ValueError:
        return None
    return dxo if dxo.data_kind in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF) else None


def release_result(fl_ctx: FLContext) -> None:
    """Let go of a site's result that was aggregated: controllers keep the context of the last one."""
    for context, key in (
        (fl_ctx, FLContextKey.TASK_RESULT),
        (fl_ctx.get_peer_context(), FLContextKey.SHAREABLE),
    ):
        detail = context.get_prop_detail(key) if context else None
        if detail:
            context.set_prop(key, None, private=detail["private"], sticky=detail["sticky"])
    give_back()
