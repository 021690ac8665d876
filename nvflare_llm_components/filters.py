"""NVFlare filters that lower the precision of messages and restore it.

Wire both on both sides, by task name (``"*"`` matches nothing in FLARE's filter tables)::

    server  task_data_filters   [PrecisionQuantizeFilter]    task_result_filters [PrecisionDequantizeFilter]
    client  task_data_filters   [PrecisionDequantizeFilter]  task_result_filters [PrecisionQuantizeFilter]

The maths lives in :mod:`nvflare_llm_components.quantization`.
"""

import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ProcessType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from nvflare_llm_components.quantization.ledger import append_record, record_of, sentence_of
from nvflare_llm_components.quantization.message import (
    META_KEY,
    Message,
    Traffic,
    decode_message,
    encode_message,
)
from nvflare_llm_components.quantization.policy import PrecisionPolicy

_RESTORE_DTYPES = {
    None: None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_TASKS_OF_WHOLE_MODELS = ("submit_model", "get_weights")  # their results are stored, not aggregated


class _PrecisionFilter(DXOFilter):
    """What both filters share: which messages they see, and the accounting."""

    def __init__(self) -> None:
        kinds = [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]
        super().__init__(supported_data_kinds=kinds, data_kinds_to_filter=kinds)
        fobs.register(TensorDecomposer)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Filter a message. The containers of a COLLECTION are copied first: a broadcast shares them."""
        return super().process(_with_own_collection(shareable), fl_ctx)

    def account(
        self, traffic: Traffic, context: dict[str, Any], fl_ctx: FLContext, cached: bool = False
    ) -> None:
        """Log one line, and append one to the ledger of the run directory where there is one."""
        record = record_of(traffic, context, cached)
        self.log_info(fl_ctx, sentence_of(record))
        run_dir = _run_dir(fl_ctx)
        if run_dir is not None:
            append_record(run_dir, record)


class PrecisionQuantizeFilter(_PrecisionFilter):
    """Lowers the precision of outgoing WEIGHTS and WEIGHT_DIFF messages.

    Works out of place, encodes once per broadcast however many clients ask, and leaves a message alone that
    is encoded already.

    Args:
        precision: ``fp32`` (no change), ``fp16``, ``bf16``, ``int8`` or ``nf4``.
        block_size: weights that share a scale in ``int8`` and ``nf4``; None is each codec's default (128
            and 64).
        overrides: {regular expression: precision} by parameter name; the first match decides.
        error_feedback: carry what rounding left out into the next round's update.

    Raises:
        ValueError: when the job is parsed, for an unknown precision, block size or pattern.
    """

    def __init__(
        self,
        *,
        precision: str = "fp16",
        block_size: int | None = None,
        overrides: dict[str, str] | None = None,
        error_feedback: bool = False,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.block_size = block_size
        self.overrides = overrides
        self.error_feedback = error_feedback
        if error_feedback:
            raise ValueError("error_feedback should be false: this release does not offer it yet.")
        self._policy = PrecisionPolicy(precision, block_size, overrides)
        self._broadcast: _Broadcast | None = None
        self._lock = threading.Lock()

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return an encoded copy, or None where the message is encoded already.

        On the server a failure ends the job: raised, it would cancel the task, and FLARE would go on with
        an empty model.
        """
        if dxo.get_meta_prop(META_KEY) is not None:
            return None
        try:
            message, cached = self._encoded(dxo, shareable)
        except Exception as e:
            if not _is_server(fl_ctx):
                raise
            self.system_panic(f"{type(self).__name__} could not encode the message: {e}", fl_ctx)
            return None
        context = _context_of("quantize", self.precision, shareable, fl_ctx)
        self.account(message.traffic, context, fl_ctx, cached)
        meta = {**_meta_of(dxo), META_KEY: message.header}
        return DXO(data_kind=dxo.data_kind, data=dict(message.values), meta=meta)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Let go of the last broadcast when the run ends."""
        if event_type == EventType.END_RUN:
            with self._lock:
                self._broadcast = None

    def _encoded(self, dxo: DXO, shareable: Shareable) -> tuple[Message, bool]:
        """The encoded message, and whether it was there already for another client of the same broadcast."""
        root_id = shareable.get_header(ReservedHeaderKey.MSG_ROOT_ID)
        if not root_id:
            return encode_message(dxo.data, self._policy), False
        with self._lock:
            if self._broadcast is not None and self._broadcast.is_of(root_id, dxo.data):
                return self._broadcast.message, True
            self._broadcast = None
            message = encode_message(dxo.data, self._policy)
            self._broadcast = _Broadcast.of(root_id, dxo.data, message)
            return message, False


class PrecisionDequantizeFilter(_PrecisionFilter):
    """Restores incoming messages that a PrecisionQuantizeFilter encoded; all others pass untouched.

    Args:
        restore_dtype: ``float32``, ``float16``, ``bfloat16`` or ``float64``; None is float32, so that the
            server averages
            in float32 whatever precision travelled.
        lazy: hand over values that decode on `materialize()`. None: on the server, for results that are
            aggregated.

    Raises:
        ValueError: when the job is parsed, for an unknown dtype.
    """

    def __init__(self, *, restore_dtype: str | None = None, lazy: bool | None = None) -> None:
        super().__init__()
        self.restore_dtype = restore_dtype
        self.lazy = lazy
        if restore_dtype not in _RESTORE_DTYPES:
            names = ", ".join(name for name in _RESTORE_DTYPES if name)
            raise ValueError(f"restore_dtype should be one of {names}, or null. Found {restore_dtype!r}.")

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return a decoded copy, or None where the message is not encoded.

        Raises:
            WireFormatError: naming the parameter, what was expected and what was found.
        """
        header = dxo.get_meta_prop(META_KEY)
        if header is None:
            return None
        dtype = _RESTORE_DTYPES[self.restore_dtype]
        values, traffic = decode_message(dxo.data, header, dtype, self._is_lazy(fl_ctx))
        context = _context_of("dequantize", header["precision"], shareable, fl_ctx)
        self.account(traffic, context, fl_ctx)
        meta = {key: value for key, value in _meta_of(dxo).items() if key != META_KEY}
        return DXO(data_kind=dxo.data_kind, data=values, meta=meta)

    def _is_lazy(self, fl_ctx: FLContext) -> bool:
        if self.lazy is not None:
            return self.lazy
        return _is_server(fl_ctx) and fl_ctx.get_prop(FLContextKey.TASK_NAME) not in _TASKS_OF_WHOLE_MODELS


@dataclass(frozen=True)
class _Broadcast:
    """The encoded form of a broadcast, and which one it is.

    Weak references tell whether a message holds the very values that were encoded, without keeping them
    alive: in relays a task keeps its id while its data changes.
    """

    root_id: str
    sources: dict[str, weakref.ref[Any]]
    message: Message

    @classmethod
    def of(cls, root_id: str, values: dict[str, Any], message: Message) -> "_Broadcast":
        return cls(root_id, {name: _reference(value) for name, value in values.items()}, message)

    def is_of(self, root_id: str, values: dict[str, Any]) -> bool:
        same_names = self.root_id == root_id and self.sources.keys() == values.keys()
        return same_names and all(self.sources[name]() is value for name, value in values.items())


def _reference(value: Any) -> "weakref.ref[Any]":
    try:
        return weakref.ref(value)
    except TypeError:  # a plain number or string
        return lambda: value  # type: ignore[return-value]


def _meta_of(dxo: DXO) -> dict[str, Any]:
    """A copy of the meta without the filter history, which the base class carries over to a new DXO."""
    return {key: value for key, value in (dxo.meta or {}).items() if key != MetaKey.FILTER_HISTORY}


def _with_own_collection(shareable: Shareable) -> Shareable:
    try:
        dxo = from_shareable(shareable)
    except ValueError:
        return shareable
    return _own(dxo).update_shareable(shareable) if dxo.data_kind == DataKind.COLLECTION else shareable


def _own(dxo: DXO) -> DXO:
    if dxo.data_kind != DataKind.COLLECTION:
        return dxo
    return DXO(dxo.data_kind, {name: _own(leaf) for name, leaf in dxo.data.items()}, dxo.meta)


def _is_server(fl_ctx: FLContext) -> bool:
    return fl_ctx.get_process_type() in (ProcessType.SERVER_JOB, ProcessType.SERVER_PARENT)


def _context_of(operation: str, precision: str, shareable: Shareable, fl_ctx: FLContext) -> dict[str, Any]:
    peer = fl_ctx.get_peer_context()
    return {
        "time": time.time(),
        "site": "server" if _is_server(fl_ctx) else fl_ctx.get_identity_name(),
        "peer": peer.get_identity_name() if peer and _is_server(fl_ctx) else None,
        "task": fl_ctx.get_prop(FLContextKey.TASK_NAME),
        "round": shareable.get_header(AppConstants.CURRENT_ROUND),
        "direction": "out" if operation == "quantize" else "in",
        "operation": operation,
        "precision": precision,
    }


def _run_dir(fl_ctx: FLContext) -> Path | None:
    job_id = fl_ctx.get_job_id()
    if fl_ctx.get_engine() is None or not job_id:
        return None
    path = Path(fl_ctx.get_workspace().get_run_dir(job_id))
    return path if path.is_dir() else None
