"""What the adapters tell each other through FLARE's messages: each may run without the others."""

from nvflare.apis.fl_constant import ProcessType
from nvflare.apis.fl_context import FLContext

ERROR_HEADER = "nvflare_llm_error"
"""Header of a failed task's reply that says why; whoever receives it may log it."""

WIRE_MARKER = "nvflare_llm_precision"
"""Meta key of a message in lower precision: the ``META_KEY`` of the wire format."""


def is_server(fl_ctx: FLContext) -> bool:
    """Whether this is the server's job process. In Swarm the sites have a persistor, too."""
    return fl_ctx.get_process_type() in (ProcessType.SERVER_JOB, ProcessType.SERVER_PARENT)
