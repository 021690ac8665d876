"""Allow-lists: one type with its range for each key that a job may set, and the sentence that refuses."""

import difflib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, create_model

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.text import printable

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][\w.\-]{0,127}$")]
"""A module's, parameter's or token's name: no pattern, no path."""

Names = Annotated[list[Name], Field(max_length=1000)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

_MAX_FAULTS = 5  # that are told: to look for what each might mean takes milliseconds
Allowed = Mapping[str, Any]
"""Type by key. A key that is not there may not be set."""


class PolicyError(ReportableError):
    """A job asks for what this site, or this package, does not accept."""


def number(low: float, high: float) -> Any:
    """A finite number from `low` to `high`."""
    return Annotated[float, Field(ge=low, le=high, allow_inf_nan=False)]


def count(low: int, high: int) -> Any:
    """A whole number from `low` to `high`."""
    return Annotated[int, Field(ge=low, le=high)]


def refuse_unlisted(
    where: str, settings: Mapping[str, Any], allowed: Allowed, reasons: Mapping[str, str] | None = None
) -> None:
    """Check a job's settings against an allow-list.

    Args:
        where: the argument, for the error.
        settings: what the job sets; None as a value stands for the default.
        allowed: what it may set.
        reasons: why some keys are not there, and what to do instead.

    Raises:
        PolicyError: naming each key that is not allowed or out of its range, what was found, and what to do.
    """
    if not isinstance(settings, Mapping):
        raise PolicyError(f"{where}: expected an object, found {type(settings).__name__}.")
    unlisted = islice((key for key in settings if key not in allowed), _MAX_FAULTS)
    faults = [_unlisted(where, str(key), allowed, reasons or {}) for key in unlisted]
    fields: dict[str, Any] = {key: (kind | None, None) for key, kind in allowed.items() if key in settings}
    model = create_model(where, __config__=ConfigDict(strict=True, extra="ignore"), **fields)
    try:
        model.model_validate(dict(settings))
    except ValidationError as error:
        faults += [_out_of_range(where, found) for found in error.errors(include_url=False)[:_MAX_FAULTS]]
    if faults:
        raise PolicyError(" ".join(dict.fromkeys(faults)))


def refusals(error: ValidationError, known: Sequence[str]) -> list[str]:
    """A sentence for each fault that was found in a file.

    Args:
        error: what pydantic found.
        known: the file's keys, each with its section.
    """
    return [
        _unknown(found, known) or _out_of_range("", found)
        for found in error.errors(include_url=False)[:_MAX_FAULTS]
    ]


def _unknown(found: Any, known: Sequence[str]) -> str:
    if found["type"] != "extra_forbidden":
        return ""
    key = printable(".".join(str(part) for part in found["loc"]), 60)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"{key}: unknown." + (f" Did you mean '{near[0]}'?" if near else "")


def _unlisted(where: str, key: str, allowed: Allowed, reasons: Mapping[str, str]) -> str:
    key = printable(key, 60)
    if key in reasons:
        return f"{where}.{key}: a job may not set it: {reasons[key]}."
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{where}.{key}: it is not among the {len(allowed)} settings that a job may make.{hint}"


def _out_of_range(where: str, found: Any) -> str:
    parts = [str(part) for part in found["loc"] if not str(part).startswith(("func", "con"))]
    path = ".".join(part for part in (where, printable(".".join(parts), 120)) if part)
    expected = found["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    sentence = f"{path}: expected {expected}, found {printable(repr(found['input']), 60)}."
    if isinstance(found["input"], str) and found["type"].startswith(("float", "int", "bool")):
        return sentence + " A value from the environment is text to FLARE: write the number in the JSON."
    return sentence
