"""The gate on the server: every site's result, of every workflow, before a controller sees it.

FLARE hands a result's `Shareable` through `AFTER_TASK_RESULT_FILTER` to its controllers. A bad one is turned
into an error reply there: a controller then drops that site from the round, where the job allows it, or ends
the job with the site's name. Whichever: nothing of the result is in the sum.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.fuel.utils.config_factory import ConfigFactory

from nvflare_llm_components.flare.headers import ERROR_HEADER, REFUSAL, WIRE_MARKER, error_of, round_of
from nvflare_llm_components.flare.peers import MAX_NAME, claimed_name, peer_name_of, sender_of
from nvflare_llm_components.policy.results import (
    WEIGHT_DIFF,
    WEIGHTS,
    ExpectedTensors,
    ResultRules,
    checked_kind,
    checked_meta,
    checked_metrics,
    checked_tensors,
)
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.tensors.text import printable

WHOLE_MODELS = (AppConstants.TASK_SUBMIT_MODEL, AppConstants.TASK_GET_WEIGHTS)
"""Tasks whose results are stored, not averaged."""
_CODES = frozenset(value for name, value in vars(ReturnCode).items() if name.isupper())
Expected = tuple[ResultRules, ExpectedTensors]
KIND_ARGUMENTS = {
    "nvflare_llm_components.executors.HFSFTExecutor": "params_type",
    "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor": "params_transfer_type",
}
"""Executors that a job tells to send weights (``FULL``) or their change (``DIFF``), and by which argument."""


class ResultGate:
    """Checks results against the server's model and the job's settings; remembers what it refused."""

    def __init__(self) -> None:
        self._rounds: dict[str, int] = {}
        self._refused: dict[str, str] = {}

    def note_task(self, fl_ctx: FLContext) -> None:
        """Look at a task that is sent: one with a round's model is answered with weights or their change."""
        task, data = fl_ctx.get_prop(FLContextKey.TASK_NAME), fl_ctx.get_prop(FLContextKey.TASK_DATA)
        current_round = round_of(data) if isinstance(data, Shareable) else None
        if current_round is not None and task not in (*WHOLE_MODELS, AppConstants.TASK_VALIDATION):
            self._rounds[task] = current_round

    def inspect(self, expected: Callable[[], Expected], fl_ctx: FLContext) -> str | None:
        """Check the result in a context, and put what may be used of it in its place.

        Args:
            expected: gives the job's rules and the server's model; a result is refused where it raises.
            fl_ctx: at AFTER_TASK_RESULT_FILTER.

        Returns:
            Why it is none: refused here, or a failure that its site tells of. None for a good one.
        """
        result, task = (fl_ctx.get_prop(key) for key in (FLContextKey.TASK_RESULT, FLContextKey.TASK_NAME))
        if not isinstance(result, Shareable):
            return None
        code = result.get_return_code()
        if not isinstance(code, str) or code != ReturnCode.OK:  # an array of one OK equals it, too
            code, reason = as_failure(result, fl_ctx)
            return f"Result of site '{_site_of(fl_ctx)}' for task '{task}': {code}. {reason}".rstrip()
        try:
            _check_name(result, fl_ctx)
            _check(task, result, task in self._rounds, *expected(), fl_ctx)
        except PolicyError as error:
            reason = str(error)
        except Exception as error:  # FLARE swallows what a handler raises: the result would pass
            reason = _unreadable(error)
        else:
            return None
        return self._refuse(task, reason, fl_ctx)

    def inspect_contribution(self, expected: Callable[[], Expected], fl_ctx: FLContext) -> str | None:
        """Check what another site contributes to a round of Swarm, at the site that averages it.

        Args:
            expected: as above.
            fl_ctx: at BEFORE_CONTRIBUTION_ACCEPT.

        Returns:
            Why it was refused; None for a good one.
        """
        result = fl_ctx.get_prop(AppConstants.TRAINING_RESULT)
        if not isinstance(result, Shareable):
            return None
        try:
            _check(AppConstants.TASK_TRAIN, result, True, *expected(), fl_ctx)
        except PolicyError as error:
            reason = str(error)
        except Exception as error:
            reason = _unreadable(error)
        else:
            return None
        site = _site_of(fl_ctx)
        sentence = f"The contribution of site '{site}' is refused: {reason}."
        result.set_return_code(ReturnCode.TASK_RESULT_FILTER_ERROR)
        result.set_header(ERROR_HEADER, sentence)
        as_failure(result, fl_ctx)
        return sentence

    def sentence(self, round_number: int | None) -> str:
        """Say which sites' results were refused since the last model was saved; empty for none."""
        told = " ".join(f"Site '{site}': {reason}." for site, reason in sorted(self._refused.items()))
        return f"Refused in round {round_number}: {told}" if told else ""

    def forget(self) -> None:
        """Forget what was refused: the model of its round is saved."""
        self._refused.clear()

    def _refuse(self, task: Any, reason: str, fl_ctx: FLContext) -> str:
        site = _site_of(fl_ctx)
        self._refused[site] = reason
        sent_in = f"Round {self._rounds[task]}: t" if task in self._rounds else "T"
        sentence = f"{sent_in}he result of site '{site}' for task '{task}' is refused: {reason}."
        refuse(sentence, fl_ctx)
        return sentence


def refuse(reason: str, fl_ctx: FLContext) -> None:
    """Turn the result in a context into an error reply, in place: nothing of what it held is left."""
    result = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
    result.set_return_code(ReturnCode.TASK_RESULT_FILTER_ERROR)
    result.set_header(ERROR_HEADER, reason)
    as_failure(result, fl_ctx)


def as_failure(result: Shareable, fl_ctx: FLContext) -> tuple[str, str]:
    """Leave of a failed task's reply its code and its reason, fit for a log; returns both.

    FLARE's model selector looks at what arrived, whatever filters made of it, and before its code is looked
    at: there it finds nothing.
    """
    code = result.get_return_code()
    if not isinstance(code, str) or code not in _CODES:
        code = ReturnCode.EXECUTION_RESULT_ERROR
    reason = error_of(result) or printable(fl_ctx.get_prop(REFUSAL) or "")
    for key in [key for key in result if key != ReservedHeaderKey.HEADERS]:
        del result[key]
    result.set_return_code(code)
    result.set_header(ReservedHeaderKey.CONTENT_TYPE, None)
    result.set_header(ERROR_HEADER, reason or None)
    peer = fl_ctx.get_peer_context()
    detail = peer.get_prop_detail(FLContextKey.SHAREABLE) if peer else None
    if detail:
        nothing = DXO(DataKind.METRICS, {}).to_shareable()
        peer.set_prop(FLContextKey.SHAREABLE, nothing, private=detail["private"], sticky=detail["sticky"])
    return code, reason


def kind_of_job(task: str, fl_ctx: FLContext) -> str | None:
    """The data kind of a task's results, where the server's copy of the job has its executor in it.

    Returns:
        "WEIGHTS" or "WEIGHT_DIFF"; None where the executor is none of KIND_ARGUMENTS, or not told either.
    """
    workspace = fl_ctx.get_engine().get_workspace()
    folder = workspace.get_app_config_dir(fl_ctx.get_job_id())
    config = ConfigFactory.load_config("config_fed_client.json", [folder])
    settings = config.to_dict() if config else {}
    executor = executor_of(task, settings.get("executors", []))
    name = KIND_ARGUMENTS.get(str(executor.get("path")))
    found = str(executor.get("args", {}).get(name, "FULL")) if name else ""
    if found[:1] == "{":
        found = str(settings.get(found[1:-1]))
    return {"FULL": WEIGHTS, "DIFF": WEIGHT_DIFF}.get(found)


def executor_of(task: str, entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The executor that FLARE would give a task, of a client configuration's; empty where there is none."""
    named = [(each, entry) for entry in entries for each in entry.get("tasks", [])]
    exact = [entry for each, entry in named if each == task]
    fitting = [entry for each, entry in named if "*" in each and fnmatch(task, each)]
    found: Mapping[str, Any] = next(iter(exact + fitting), {}).get("executor", {})
    return found


def _check(
    task: Any,
    result: Shareable,
    is_round: bool,
    rules: ResultRules,
    expected: ExpectedTensors,
    fl_ctx: FLContext,
) -> None:
    dxo = _dxo_of(result)
    if dxo is None or (not is_round and dxo.data_kind not in (WEIGHTS, WEIGHT_DIFF, DataKind.METRICS)):
        if is_round:
            raise PolicyError("expected weights, found none")
        return
    if dxo.data_kind == DataKind.METRICS and not is_round:
        replacement = DXO(DataKind.METRICS, checked_metrics(dxo.data), dict(dxo.meta))
    else:
        replacement = _checked_weights(dxo, task, rules, expected, fl_ctx)
    replacement.update_shareable(result)
    _drop_all_but_dxo(result)


def _unreadable(error: Exception) -> str:
    return f"it cannot be read ({type(error).__name__})"


def _check_name(result: Shareable, fl_ctx: FLContext) -> None:
    """FLARE's selectors and aggregators go by the name that a site gives itself: it must be its own."""
    sender = sender_of(result)
    if sender is not None and claimed_name(fl_ctx) != printable(sender, MAX_NAME):
        raise PolicyError("expected it under the site's own name, found another")


def _dxo_of(result: Shareable) -> DXO | None:
    """The DXO of a result. None for a result that is something else; one that is broken raises."""
    if result.get_header(ReservedHeaderKey.CONTENT_TYPE) != "DXO":
        return None
    return from_shareable(result)


def _checked_weights(
    dxo: DXO, task: Any, rules: ResultRules, expected: ExpectedTensors, fl_ctx: FLContext
) -> DXO:
    if dxo.get_meta_prop(WIRE_MARKER) is not None:
        raise PolicyError(
            "expected full precision, found it still encoded. Is PrecisionDequantizeFilter in the server's "
            "task_result_filters for this task"
        )
    is_whole = task in WHOLE_MODELS
    kind = WEIGHTS if is_whole else rules.data_kind or kind_of_job(str(task), fl_ctx) or WEIGHTS
    checked_kind(dxo.data_kind, kind)
    meta = checked_meta(dxo.meta, rules, MetaKey.NUM_STEPS_CURRENT_ROUND, MetaKey.INITIAL_METRICS)
    return DXO(kind, checked_tensors(dxo.data, expected, not is_whole), meta)


def _drop_all_but_dxo(result: Shareable) -> None:
    for key in [key for key in result if key not in (ReservedHeaderKey.HEADERS, "DXO")]:
        del result[key]


def _site_of(fl_ctx: FLContext) -> str:
    return peer_name_of(fl_ctx) or "?"
