"""What a result and its context tell the persistor."""

import math
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_llm_components.flare.memory import give_back


def metrics_of(result: Any) -> dict[str, float]:
    """The finite numbers in a validation's result; none for a failed task, or one without."""
    try:
        metrics = dict(from_shareable(result).data)
    except (ValueError, TypeError, AttributeError):  # a failed task, or no metrics
        return {}
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {str(name): float(value) for name, value in numbers.items() if math.isfinite(value)}


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
