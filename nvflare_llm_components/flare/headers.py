"""What the adapters tell each other through FLARE's messages: each may run without the others."""

from nvflare.apis.fl_constant import ProcessType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from nvflare_llm_components.tensors.text import printable

ERROR_HEADER = "nvflare_llm_error"
"""Header of a failed task's reply that says why; whoever receives it may log it."""

REFUSAL = "nvflare_llm_refusal"
"""Property of a result's context: why a filter could not read it, which FLARE tells no controller."""

WIRE_MARKER = "nvflare_llm_precision"
"""Meta key of a message in lower precision: the ``META_KEY`` of the wire format."""


def is_server(fl_ctx: FLContext) -> bool:
    """Whether this is the server's job process. In Swarm the sites have a persistor, too."""
    return fl_ctx.get_process_type() in (ProcessType.SERVER_JOB, ProcessType.SERVER_PARENT)


def round_of(shareable: Shareable) -> int | None:
    """The round that a message names; None where it names none, or something that is no round."""
    number = shareable.get_header(AppConstants.CURRENT_ROUND)
    is_number = isinstance(number, int) and not isinstance(number, bool)
    return number if is_number and 0 <= number < 1 << 31 else None


def error_of(reply: Shareable) -> str | None:
    """Why a task failed, as the other side says it: one line, escaped and cut; None where it does not."""
    reason = reply.get_header(ERROR_HEADER)
    if isinstance(reason, str):
        return printable(reason) if reason else None
    return None if reason is None else printable(reason)  # what an array is worth, Python will not say
