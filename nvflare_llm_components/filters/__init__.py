"""NVFlare filters that lower the precision of messages and restore it.

Wire both on both sides, by task name (``"*"`` matches nothing in FLARE's filter tables)::

    server  task_data_filters   [PrecisionQuantizeFilter]    task_result_filters [PrecisionDequantizeFilter]
    client  task_data_filters   [PrecisionDequantizeFilter]  task_result_filters [PrecisionQuantizeFilter]

The maths lives in :mod:`nvflare_llm_components.quantization`; what this module adds is which message is
whose; :mod:`.base` is what both filters share.
"""

import shutil
import threading
from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from nvflare_llm_components.filters.base import PrecisionFilter
from nvflare_llm_components.flare.gate import refuse
from nvflare_llm_components.flare.headers import REFUSAL, is_server, round_of
from nvflare_llm_components.flare.memory import trim
from nvflare_llm_components.flare.messages import (
    context_of,
    filters_between,
    is_encoded,
    is_model_of_a_round,
    meta_of,
    missing_half,
    state_dir_of,
)
from nvflare_llm_components.flare.peers import inside_only
from nvflare_llm_components.flare.taken import (
    TAKEN_FIELD,
    hear_taken,
    note_taken,
    taken_round,
    taken_round_of_peer,
)
from nvflare_llm_components.flare.tasks import is_simulator
from nvflare_llm_components.quantization.broadcast import Broadcast, Content
from nvflare_llm_components.quantization.feedback import encode_with_feedback, open_residual
from nvflare_llm_components.quantization.lazy import SOURCE, RestoreDtype
from nvflare_llm_components.quantization.message import META_KEY, Message, decode_message, encode_message
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.quantization.shadow import HEADER_FIELD, advance, follow, held_shadow
from nvflare_llm_components.quantization.traffic import Traffic
from nvflare_llm_components.quantization.wire import WireFormatError
from nvflare_llm_components.tensors.text import printable

_RESTORE_DTYPES: dict[str | None, RestoreDtype] = {
    None: None,
    SOURCE: SOURCE,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_TASKS_OF_WHOLE_MODELS = ("submit_model", "get_weights")  # their results are stored, not aggregated

# Properties of the FLContext. What a client holds is public, so that each of its requests tells the server.
_HELD_SHADOW = "nvflare_llm_shadow"


class PrecisionQuantizeFilter(PrecisionFilter):
    """Lowers the precision of outgoing WEIGHTS and WEIGHT_DIFF messages.

    Works out of place, encodes once per broadcast however many clients ask, and leaves a message alone that
    is encoded already. ``nf4`` and ``int2`` are for differences: a server's broadcast of a round's weights
    carries the difference to what the clients hold, see :mod:`nvflare_llm_components.quantization.shadow`,
    and other whole weights travel at ``int8`` in their place. Give it differences at any precision: of whole
    weights, rounding loses what a round changed by less than half a step.

    Args:
        precision: ``fp32`` (no change), ``fp16``, ``bf16``, ``int8``, ``nf4`` or ``int2``.
        block_size: weights that share a scale; None is the default: 128 in ``int8``, else 64.
        overrides: {regular expression: precision} by parameter name; the first match decides.
        error_feedback: carry what rounding left out of one update into the next (``params_type="DIFF"``).

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
        self._policy = PrecisionPolicy(precision, block_size, overrides)
        self._policy_of_whole = self._policy.for_whole_weights()
        self._has_warned = False
        self._broadcast: Broadcast | None = None
        self._lock = threading.Lock()
        self._undecoded_task: str | None = None

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """Return an encoded copy, or None where the message is encoded already.

        On the server a failure ends the job: raised, it would cancel the task, and FLARE would go on with an
        empty model.
        """
        if dxo.get_meta_prop(META_KEY) is not None:
            return None
        try:
            message, cached = self._encoded(dxo, shareable, fl_ctx)
        except Exception as e:
            if not is_server(fl_ctx):
                raise
            self.system_panic(f"{type(self).__name__} could not encode the message: {printable(e)}", fl_ctx)
            return None
        context = context_of("quantize", message.header, shareable, fl_ctx)
        self.account(message.traffic, context, fl_ctx, cached)
        header = message.header | {TAKEN_FIELD: taken_round_of_peer(shareable, fl_ctx)}
        meta = meta_of(dxo) | {META_KEY: header}
        return DXO(data_kind=dxo.data_kind, data=dict(message.values), meta=meta)

    @inside_only
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Watch that what this side receives is decoded, and let go of the last broadcast in time."""
        if event_type == EventType.AFTER_TASK_DATA_FILTER and not is_server(fl_ctx):
            if fl_ctx.get_prop(FLContextKey.FILTER_DIRECTION) == FilterKey.OUT:
                return  # a task that this client sends to another one: Swarm
            encoded = is_encoded(fl_ctx.get_prop(FLContextKey.TASK_DATA))
            self._undecoded_task = fl_ctx.get_prop(FLContextKey.TASK_NAME) if encoded else None
        elif event_type == EventType.AFTER_TASK_RESULT_FILTER and is_server(fl_ctx):
            if is_encoded(fl_ctx.get_prop(FLContextKey.TASK_RESULT)):
                task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
                refuse(missing_half("server", "task_result_filters", task), fl_ctx)
        elif event_type == EventType.BEFORE_TASK_RESULT_FILTER and is_server(fl_ctx):
            self._let_go_of_broadcast(is_over=False)
        elif event_type == EventType.END_RUN:
            self._let_go_of_broadcast(is_over=True)
            if (folder := state_dir_of(fl_ctx)) and is_server(fl_ctx) and not is_simulator(fl_ctx):
                # FLARE puts this run directory into what is downloaded, and then removes it.
                shutil.rmtree(folder, ignore_errors=True)

    def _let_go_of_broadcast(self, is_over: bool) -> None:
        """Free the memory for the results that arrive; a late client costs one more encoding.

        A step of the shadow is kept: taken again, it would lead to another shadow.
        """
        with self._lock:
            if is_over or (self._broadcast and isinstance(self._broadcast.content, Message)):
                self._broadcast = None

    def _encoded(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> tuple[Message, bool]:
        """The message for this receiver, and whether it was encoded before for another one."""
        root_id = shareable.get_header(ReservedHeaderKey.MSG_ROOT_ID)
        if not is_server(fl_ctx) or not root_id:
            return self._encode_result(dxo, shareable, fl_ctx), False
        peer = fl_ctx.get_peer_context()
        held = peer.get_prop(_HELD_SHADOW) if peer else None
        with self._lock:
            cached = self._broadcast is not None and self._broadcast.is_of(root_id, dxo.data)
            if not cached:
                self._broadcast = None  # let go of it before the next one is made
                content = self._encode_broadcast(dxo, shareable, fl_ctx)
                self._broadcast = Broadcast.of(root_id, dxo.data, content)
            assert self._broadcast is not None
            known = held if isinstance(held, str) else None  # a site says what it likes
            return self._broadcast.content.message_for(known), cached

    def _encode_broadcast(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> Content:
        folder = state_dir_of(fl_ctx)
        if folder and self._policy.has_differences and is_model_of_a_round(shareable, DataKind.WEIGHTS):
            return advance(dxo.data, self._policy, folder)
        return self._encode_whole(dxo, fl_ctx)

    def _encode_result(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> Message:
        trim()  # what the task's message took
        if self._undecoded_task is not None:
            raise ValueError(missing_half("client", "task_data_filters", self._undecoded_task))
        current_round = round_of(shareable)
        if not self.error_feedback or current_round is None:
            return self._encode_whole(dxo, fl_ctx)
        folder = state_dir_of(fl_ctx)
        if folder is None or not is_model_of_a_round(shareable, DataKind.WEIGHT_DIFF):
            raise ValueError(
                "error_feedback carries what was left out of one update into the next, in the run directory. "
                f"Expected a WEIGHT_DIFF result. Found {dxo.data_kind}. Set params_type to DIFF."
            )
        residual = open_residual(folder, taken_round(current_round, fl_ctx))
        if residual.dropped_rounds:
            self.log_warning(
                fl_ctx,
                f"Round {current_round}: dropped the residuals of rounds {residual.dropped_rounds}, "
                f"since the last update that the server took is of round {residual.taken_round}.",
            )
        return encode_with_feedback(dxo.data, self._policy, folder, current_round, residual)

    def _encode_whole(self, dxo: DXO, fl_ctx: FLContext) -> Message:
        """A message that is complete in itself: differences as asked for, weights not below ``int8``."""
        if dxo.data_kind != DataKind.WEIGHTS or not self._policy.has_differences:
            return encode_message(dxo.data, self._policy)
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
        if task not in (*_TASKS_OF_WHOLE_MODELS, AppConstants.TASK_VALIDATION) and not self._has_warned:
            self._has_warned = True
            self.log_warning(
                fl_ctx,
                f"Task {printable(task)!r}: {self.precision} is for differences. Found whole weights, which "
                "travel at int8. Set params_type to DIFF where sites send results.",
            )
        return encode_message(dxo.data, self._policy_of_whole)


class PrecisionDequantizeFilter(PrecisionFilter):
    """Restores incoming messages that a PrecisionQuantizeFilter encoded; all others pass untouched.

    Args:
        restore_dtype: ``float32``, ``float16``, ``bfloat16``, ``float64``, or ``source`` for what the sender
            had; None is float32, so that the server averages in float32 whatever precision travelled.
        lazy: hand over values that decode when they are used. None: on the server, for results to aggregate.

    Raises:
        ValueError: when the job is parsed, for an unknown dtype.
    """

    def __init__(self, *, restore_dtype: str | None = None, lazy: bool | None = None) -> None:
        super().__init__()
        self.restore_dtype = restore_dtype
        self.lazy = lazy
        self._has_warned = False
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
            self._warn_of_plain_message(fl_ctx)
            return None
        if not is_server(fl_ctx):
            trim()  # what the site's last message took: FLARE lets go of it when the next one is there
        try:
            values, traffic = self._decoded(dxo.data, header, fl_ctx)
        except WireFormatError as e:
            reason = f"{e}{filters_between(dxo, PrecisionQuantizeFilter.__name__)}"
            fl_ctx.set_prop(REFUSAL, reason, private=True, sticky=False)
            raise WireFormatError(reason) from e
        self.account(traffic, context_of("dequantize", header, shareable, fl_ctx), fl_ctx, cached=False)
        hear_taken(header, fl_ctx)
        meta = {key: value for key, value in meta_of(dxo).items() if key != META_KEY}
        return DXO(data_kind=dxo.data_kind, data=values, meta=meta)

    @inside_only
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """On a site, tell with every request which shadow it holds; on the server, note what was taken.

        A shadow is read again while the site waits for the others: one that the disk has changed is not told.
        """
        if event_type == AppEventType.AFTER_CONTRIBUTION_ACCEPT and is_server(fl_ctx):
            note_taken(fl_ctx)
        elif event_type in (EventType.START_RUN, EventType.AFTER_SEND_TASK_RESULT) and not is_server(fl_ctx):
            self._tell_shadow(fl_ctx)

    def _tell_shadow(self, fl_ctx: FLContext) -> None:
        folder = state_dir_of(fl_ctx)
        held = held_shadow(folder) if folder else None
        fl_ctx.set_prop(_HELD_SHADOW, held, private=False, sticky=True)

    def _decoded(
        self, values: dict[str, Any], header: Any, fl_ctx: FLContext
    ) -> tuple[dict[str, Any], Traffic]:
        dtype, lazy = _RESTORE_DTYPES[self.restore_dtype], self._is_lazy(fl_ctx)
        if is_server(fl_ctx) or not isinstance(header, dict) or header.get(HEADER_FIELD) is None:
            return decode_message(values, header, dtype, lazy)
        folder = state_dir_of(fl_ctx)
        if folder is None:
            raise ValueError("A step of a shadow needs a run directory to keep its shadow in. Found none.")
        try:
            result = follow(values, header, folder, dtype, lazy)
        except WireFormatError:
            self._tell_shadow(fl_ctx)
            raise
        fl_ctx.set_prop(_HELD_SHADOW, header[HEADER_FIELD]["id"], private=False, sticky=True)
        return result

    def _is_lazy(self, fl_ctx: FLContext) -> bool:
        if self.lazy is not None:
            return self.lazy
        return is_server(fl_ctx) and fl_ctx.get_prop(FLContextKey.TASK_NAME) not in _TASKS_OF_WHOLE_MODELS

    def _warn_of_plain_message(self, fl_ctx: FLContext) -> None:
        if not self._has_warned:
            self._has_warned = True
            other = "client's task_result_filters" if is_server(fl_ctx) else "server's task_data_filters"
            self.log_warning(
                fl_ctx, f"A message came at full precision: no PrecisionQuantizeFilter in the {other}."
            )
