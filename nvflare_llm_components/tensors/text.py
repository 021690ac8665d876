"""Text from outside, made fit for a log line, a ledger or an error; durations; and what ends a prompt."""

from collections.abc import Sequence

ANSWER_CUE = "\n\nResponse:\n"
"""Ends the prompt of an `input`/`output` row, in training and in generation. The line break is a token
boundary in common tokenizers, so the prompt alone and the prompt with its completion are cut alike."""


def printable(text: object, limit: int = 500) -> str:
    r"""One line of at most `limit` characters: what does not print is escaped, and what is longer is cut.

    Args:
        text: anything; what cannot be written as text is named by its type.
        limit: characters that are kept of it.

    >>> printable("a\nERROR forged line")
    'a\\nERROR forged line'
    """
    try:
        written = str(text)
    except Exception:  # such as a RecursionError: it came from outside
        return f"<{type(text).__name__}>"
    kept = written[:limit]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept)
    return escaped if len(written) <= limit else f"{escaped}... ({len(written):,} characters)"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, by commas.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(8.4), duration(300), duration(9000)
    ('8 s', '5 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
