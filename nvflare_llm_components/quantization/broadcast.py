"""The encoded form of a broadcast, kept for the other clients that will ask for it."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nvflare_llm_components.quantization.message import Message


class Content(Protocol):
    """What a client gets of a broadcast; it may depend on the shadow that the client holds."""

    def message_for(self, held: str | None) -> Message:
        """The message for a client that holds the shadow `held`."""


@dataclass(frozen=True)
class Broadcast:
    """The encoded form of a broadcast, and which one it is.

    Weak references tell whether a message holds the very values that were encoded, without keeping them
    alive: in relays a task keeps its id while its data changes, and memory that was freed is used again.
    """

    root_id: str
    content: Content
    _sources: dict[str, Callable[[], Any]]

    @classmethod
    def of(cls, root_id: str, values: Mapping[str, Any], content: Content) -> "Broadcast":
        """Remember the `content` that `values` were encoded to."""
        return cls(root_id, content, {name: _reference(value) for name, value in values.items()})

    def is_of(self, root_id: str, values: Mapping[str, Any]) -> bool:
        """Whether `values` are the very objects that were encoded, under the same task."""
        if self.root_id != root_id or self._sources.keys() != values.keys():
            return False
        return all(self._sources[name]() is value for name, value in values.items())


def _reference(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:  # a plain number or string
        return lambda: value
