"""What the precision filters read from FLARE's contexts and messages, and what they leave there."""

import time
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from nvflare_llm_components.conventions import is_server
from nvflare_llm_components.quantization.message import META_KEY

# Properties of the FLContext.
TAKEN_ROUNDS = "nvflare_llm_taken_rounds"  # server: {client: round of the last result that arrived}
TAKEN_ROUND = "nvflare_llm_taken_round"  # client: what the server says of its last result
TAKEN_FIELD = "taken_round"  # the same, in the header of a message


def meta_of(dxo: DXO) -> dict[str, Any]:
    """A copy of the meta without the filter history, which the base class carries over to a new DXO."""
    return {key: value for key, value in (dxo.meta or {}).items() if key != MetaKey.FILTER_HISTORY}


def with_own_collection(shareable: Shareable) -> Shareable:
    """A COLLECTION in containers of its own; anything else as it is."""
    try:
        dxo = from_shareable(shareable)
    except ValueError:
        return shareable
    return _own(dxo).update_shareable(shareable) if dxo.data_kind == DataKind.COLLECTION else shareable


def _own(dxo: DXO) -> DXO:
    if dxo.data_kind != DataKind.COLLECTION:
        return dxo
    return DXO(dxo.data_kind, {name: _own(leaf) for name, leaf in dxo.data.items()}, dxo.meta)


def is_encoded(shareable: object) -> bool:
    """Whether a message, or a member of its collection, is in our format."""
    try:
        dxo = from_shareable(shareable)
    except (AttributeError, ValueError):
        return False
    leaves = dxo.data.values() if dxo.data_kind == DataKind.COLLECTION else [dxo]
    return any(isinstance(leaf, DXO) and leaf.get_meta_prop(META_KEY) is not None for leaf in leaves)


def missing_half(side: str, table: str, task: str | None) -> str:
    """What to say where a message was not decoded."""
    return (
        f"Task {task!r}: the {side} received a message in reduced precision and nothing decoded it. "
        f"Add PrecisionDequantizeFilter for this task to {table} of the {side}'s configuration."
    )


def is_model_of_a_round(shareable: Shareable) -> bool:
    """Whether a message is one round's single model or update, not a model to evaluate or one of several."""
    is_single = from_shareable(shareable).data_kind != DataKind.COLLECTION
    return is_single and shareable.get_header(AppConstants.CURRENT_ROUND) is not None


def context_of(operation: str, header: Any, shareable: Shareable, fl_ctx: FLContext) -> dict[str, Any]:
    """What a ledger's line says of where a message was seen."""
    return {
        "time": time.time(),
        "site": "server" if is_server(fl_ctx) else fl_ctx.get_identity_name(),
        "peer": _peer_name(fl_ctx) if is_server(fl_ctx) else None,
        "task": fl_ctx.get_prop(FLContextKey.TASK_NAME),
        "round": shareable.get_header(AppConstants.CURRENT_ROUND),
        "direction": "out" if operation == "quantize" else "in",
        "operation": operation,
        "precision": str(header.get("precision")),
    }


def _peer_name(fl_ctx: FLContext) -> str | None:
    peer = fl_ctx.get_peer_context()
    return peer.get_identity_name() if peer else None


def remember_taken(header: Any, shareable: Shareable, fl_ctx: FLContext) -> None:
    """On the server: this client's result arrived. On a client: what the server says of the last one."""
    if is_server(fl_ctx):
        taken = fl_ctx.get_prop(TAKEN_ROUNDS) or {}
        taken = taken | {_peer_name(fl_ctx): shareable.get_header(AppConstants.CURRENT_ROUND)}
        fl_ctx.set_prop(TAKEN_ROUNDS, taken, private=True, sticky=True)
    elif TAKEN_FIELD in header:
        fl_ctx.set_prop(TAKEN_ROUND, header[TAKEN_FIELD], private=True, sticky=False)


def taken_round_of_peer(fl_ctx: FLContext) -> int | None:
    """On the server: the round of the last result that arrived from the client asking; None for none."""
    taken: dict[str | None, int] = fl_ctx.get_prop(TAKEN_ROUNDS) or {}
    return taken.get(_peer_name(fl_ctx))


def run_dir_of(fl_ctx: FLContext) -> Path | None:
    """The job's run directory on this site, where there is one."""
    job_id = fl_ctx.get_job_id()
    if fl_ctx.get_engine() is None or not job_id:
        return None
    path = Path(fl_ctx.get_workspace().get_run_dir(job_id))
    return path if path.is_dir() else None


def state_dir_of(fl_ctx: FLContext) -> Path | None:
    """Where residuals and shadows live."""
    run_dir = run_dir_of(fl_ctx)
    return run_dir / "filter_state" if run_dir else None
