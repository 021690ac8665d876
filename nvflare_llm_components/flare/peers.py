"""Who is on the other side: FLARE's token says it, not what a message says of itself."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from nvflare.apis.fl_constant import EventScope, FedEventHeader, FLContextKey, ServerCommandKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from nvflare_llm_components.tensors.text import printable

MAX_NAME = 100  # characters
Handler = Callable[[Any, str, FLContext], None]


def sender_of(message: object) -> str | None:
    """On the server: the site whose token a message came with; None where FLARE has noted none."""
    client = message.get_header(ServerCommandKey.FL_CLIENT) if isinstance(message, Shareable) else None
    name = getattr(client, "name", None)
    return name if isinstance(name, str) else None


def claimed_name(fl_ctx: FLContext) -> str | None:
    """The name that the other side gives itself, fit for logs and files; None where it is no text."""
    peer = fl_ctx.get_peer_context()
    name = peer.get_identity_name() if peer else None
    return printable(name, MAX_NAME) if isinstance(name, str) else None


def peer_name_of(fl_ctx: FLContext) -> str | None:
    """The other side of this exchange: by its token where there is one, else as it calls itself."""
    peer = fl_ctx.get_peer_context()
    return (sender_of(peer.get_prop(FLContextKey.SHAREABLE)) if peer else None) or claimed_name(fl_ctx)


def inside_only(handle_event: Handler) -> Handler:
    """Let a component's ``handle_event`` not see what sites fire: FLARE fires any event that one names.

    Args:
        handle_event: the method.
    """

    @wraps(handle_event)
    def guarded(self: Any, event_type: str, fl_ctx: FLContext) -> None:
        if not is_from_outside(fl_ctx):
            handle_event(self, event_type, fl_ctx)

    return guarded


def is_from_outside(fl_ctx: FLContext) -> bool:
    """Whether a site fired the event that is handled, also one of FLARE's own."""
    data = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
    is_federated = fl_ctx.get_prop(FLContextKey.EVENT_SCOPE) == EventScope.FEDERATION
    return is_federated and isinstance(data, Shareable) and data.get_header(FedEventHeader.DIRECTION) == "in"
