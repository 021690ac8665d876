"""What a result and its context tell the persistor."""

from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.ccwf.common import Constant as SwarmConstant

from nvflare_llm_components.flare.memory import trim
from nvflare_llm_components.flare.peers import peer_name_of
from nvflare_llm_components.flare.rounds import ROUND_RECORD
from nvflare_llm_components.flare.tasks import finite

SERVER_PREFIX = "SRV_"  # what FLARE's evaluations put before the name of a server's model


def record_of(fl_ctx: FLContext, saved_round: int, source: str | None) -> dict[str, Any]:
    """What a saved model's record says of its round: job, sites, and what `RoundLog` knows.

    Args:
        fl_ctx: FLARE's context.
        saved_round: whose result the model is.
        source: what the job calls the model that it started from.
    """
    stats = fl_ctx.get_prop(AppConstants.AGGREGATION_STATS) or {}
    record = {
        "round": saved_round,
        "job_id": fl_ctx.get_job_id(),
        "metrics": {},
        "parents": {"source": source, "sites": sorted(stats.get("contributors", []))},
    }
    told = fl_ctx.get_prop(ROUND_RECORD)
    return {**record, "round_log": told} if told and told["round"] == saved_round else record


def evaluated_round(fl_ctx: FLContext) -> int:
    """Round in which the best model was evaluated: the result of the round before it."""
    # Swarm shares the best model when all is done, and says in which round it was evaluated.
    number: int = fl_ctx.get_prop(SwarmConstant.ROUND, fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
    return number


def validation_of(fl_ctx: FLContext) -> tuple[str, str, dict[str, float]] | None:
    """Model, site and metrics of a cross-site evaluation; None where the model is not the server's."""
    owner = str(fl_ctx.get_prop(AppConstants.MODEL_OWNER))
    metrics = metrics_of(fl_ctx.get_prop(AppConstants.VALIDATION_RESULT))
    if not owner.startswith(SERVER_PREFIX) or not metrics:
        return None
    return owner.removeprefix(SERVER_PREFIX), str(fl_ctx.get_prop(AppConstants.DATA_CLIENT)), metrics


def metrics_of(result: Any) -> dict[str, float]:
    """The finite numbers in a validation's result; none for a failed task, or one without."""
    try:
        metrics = dict(from_shareable(result).data)
    except (ValueError, TypeError, AttributeError):  # a failed task, or no metrics
        return {}
    return finite(metrics)


def contribution_of(fl_ctx: FLContext) -> tuple[str, DXO] | None:
    """Site and weights, or their change, of a result that was aggregated; None for any other.

    Args:
        fl_ctx: at AFTER_CONTRIBUTION_ACCEPT, which FLARE fires for refused results and evaluations, too.
    """
    site, result = peer_name_of(fl_ctx), fl_ctx.get_prop(AppConstants.TRAINING_RESULT)
    try:
        dxo = from_shareable(result)
    except (AttributeError, ValueError):
        return None
    is_taken = bool(fl_ctx.get_prop(AppConstants.AGGREGATION_ACCEPTED))
    if site is None or not is_taken or dxo.data_kind not in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF):
        return None
    return site, dxo


def release_result(fl_ctx: FLContext) -> None:
    """Let go of a site's result that was aggregated: controllers keep the context of the last one."""
    for context, key in (
        (fl_ctx, FLContextKey.TASK_RESULT),
        (fl_ctx.get_peer_context(), FLContextKey.SHAREABLE),
    ):
        detail = context.get_prop_detail(key) if context else None
        if detail:
            context.set_prop(key, None, private=detail["private"], sticky=detail["sticky"])
    trim()
