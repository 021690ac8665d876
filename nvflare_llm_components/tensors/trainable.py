"""Which tensors of a model train, by patterns of their names: the same on a server and on a site."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.names import aliases_of, checkpoint_names
from nvflare_llm_components.tensors.text import printable

MAX_PATTERNS = 100
MAX_LENGTH = 200


def trained_parameters(model: Any, patterns: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters that train, each with its names in the checkpoint.

    A parameter that a checkpoint holds in pieces (as stacked experts) trains where one of them matches, and
    a tied weight where one of its names does.

    Args:
        model: a transformers model; it may be on the meta device.
        patterns: of names in the checkpoint, as in ``fnmatch``: ``*``, ``?`` and ``[...]``, case matters.

    Raises:
        CheckpointError: if the patterns are no short list of short texts, or one of them matches nothing.
    """
    _check(patterns)
    names = {name: checkpoint_names(model, name) for name, _ in model.named_parameters()}
    further: dict[str, list[str]] = {}
    for alias, name in aliases_of(model).items():
        further.setdefault(name, []).append(alias)
    unused, found = set(patterns), {}
    for parameter, own in names.items():
        known = [*own, *(alias for name in own for alias in further.get(name, ()))]
        matching = {pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in known)}
        unused -= matching
        if matching:
            found[parameter] = own
    if unused:
        some = [name for own in names.values() for name in own]
        raise CheckpointError(
            "trainable: expected patterns that match tensors of the model, found "
            f"{printable(sorted(unused), 200)} that match none of {len(some)}, such as {', '.join(some[:3])}."
        )
    return found


def _check(patterns: object) -> None:
    is_list = isinstance(patterns, list | tuple) and 0 < len(patterns) <= MAX_PATTERNS
    if not is_list or not all(_is_short(pattern) for pattern in patterns):  # type: ignore[attr-defined]
        raise CheckpointError(
            f"trainable: expected 1 to {MAX_PATTERNS} patterns of up to {MAX_LENGTH} characters, "
            f"found {printable(patterns, 100)}."
        )


def _is_short(pattern: object) -> bool:
    return isinstance(pattern, str) and 0 < len(pattern) <= MAX_LENGTH
