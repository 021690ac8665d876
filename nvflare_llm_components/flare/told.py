"""What is told of an error: to the server never data, to the site's own log all of it."""

import os
import traceback
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from nvflare.apis.fl_context import FLContext

from nvflare_llm_components.flare.site import policy_of
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.text import printable

_HEAD = 6  # characters by which a variable's value is recognized
_PACKAGE = Path(__file__).parents[1]


def told(fl_ctx: FLContext, error: BaseException) -> str:
    """What the server is told of an error: never data.

    Args:
        fl_ctx: of the task, with the site whose policy says how much is told.
        error: what the task raised.

    Returns:
        The text of an error of ours. One of a library may quote a row: of that its type, and the line of ours
        that met it.
    """
    try:
        how_much = policy_of(fl_ctx).leaves.errors
    except PolicyError:
        how_much = "kind"
    if how_much == "reason" and isinstance(error, ReportableError):
        return f"{type(error).__name__}: {without_values(printable(error, 1000), os.environ)}"
    return f"{type(error).__name__} at {_own_place(error)}; the text is in this site's own log.txt"


def without_values(text: str, environ: Mapping[str, str]) -> str:
    """A text with the values of environment variables, or as much of one as is in it, replaced by names.

    FLARE puts any variable of a site that a job names into the job's arguments: what was found there is
    an administrator's secret as soon as it is told.
    """
    for name, value in sorted(environ.items(), key=lambda item: -len(item[1])):
        ways = [way for way in (value, repr(value)[1:-1]) if len(way) >= _HEAD]
        end = 0
        # The first of both: one way of writing a value may stand within the other.
        while begins := [at for way in ways if (at := text.find(way[:_HEAD], end)) >= 0]:
            begin = min(begins)
            alike = [way for way in ways if text.startswith(way[:_HEAD], begin)]
            end = begin + len(f"{{${name}}}")
            text = f"{text[:begin]}{{${name}}}{_beyond(text[begin:], alike)}"
    return text


def _beyond(text: str, beginnings: Sequence[str]) -> str:
    """What is left of a text after the longest beginning that it has in common with one of several."""
    common = (
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, beginning, strict=False)))
        for beginning in beginnings
    )
    return text[max(common) :]


def traceback_of(error: BaseException) -> str:
    """The whole of an error for this site's own log; what came from outside can forge no line of it."""
    lines, cause = [], error.__cause__ or error.__context__
    if cause is not None:
        lines = [traceback_of(cause), "which led to:\n"]
    frames = traceback.format_tb(error.__traceback__)
    return "".join([*lines, *frames, f"{type(error).__name__}: {printable(error, 4000)}\n"])


def _own_place(error: BaseException) -> str:
    frames = [
        f"{Path(frame.filename).relative_to(_PACKAGE.parent)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    return frames[-1] if frames else "a place outside this package"
