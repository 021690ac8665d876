"""What the precision filters read from FLARE's contexts and messages, and what they leave there."""

import time
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_llm_components.flare.headers import WIRE_MARKER, is_server, round_of
from nvflare_llm_components.flare.peers import peer_name_of
from nvflare_llm_components.tensors.text import printable


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
    return any(isinstance(leaf, DXO) and leaf.get_meta_prop(WIRE_MARKER) is not None for leaf in leaves)


def missing_half(side: str, table: str, task: str | None) -> str:
    """What to say where a message was not decoded."""
    return (
        f"Task {task!r}: the {side} received a message in reduced precision and nothing decoded it. "
        f"Add PrecisionDequantizeFilter for this task to {table} of the {side}'s configuration."
    )


def filters_between(dxo: DXO, encoder: str) -> str:
    """What to say of a refused message that other filters saw while it was encoded; empty for none.

    Args:
        dxo: the message, with FLARE's history of filters; names in it come from outside.
        encoder: class name of the filter that encodes.
    """
    history = dxo.get_filter_history()
    names = [str(name) for name in history] if isinstance(history, list) else []
    after = names[len(names) - names[::-1].index(encoder) :] if encoder in names else []
    if not after:
        return ""
    return (
        f" The likely cause is the order of filters: {printable(', '.join(after), 200)} ran after {encoder}, "
        f"on bytes instead of weights. The sender's list should end with {encoder}, and the receiver's begin "
        "with the filter that decodes."
    )


def is_model_of_a_round(shareable: Shareable, kind: str) -> bool:
    """Whether a message is one round's single model or update, not a model to evaluate or one of several."""
    return from_shareable(shareable).data_kind == kind and round_of(shareable) is not None


def context_of(operation: str, header: Any, shareable: Shareable, fl_ctx: FLContext) -> dict[str, Any]:
    """What a ledger's line says of where a message was seen; `header` is checked."""
    task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
    return {
        "time": time.time(),
        "site": "server" if is_server(fl_ctx) else fl_ctx.get_identity_name(),
        "peer": peer_name_of(fl_ctx) if is_server(fl_ctx) else None,
        "task": task if task is None else printable(task, 100),
        "round": round_of(shareable),
        "direction": "out" if operation == "quantize" else "in",
        "operation": operation,
        "precision": header["precision"],
    }


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
