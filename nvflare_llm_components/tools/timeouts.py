"""Whether a message gets through in the time that a job gives it: arithmetic, before anything is run."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

# Of the client's configuration. A result has to be with the server within it, its decoding and the queue
# before the average included: all other timeouts that a message meets count idle time only.
LIMITS = ("submit_task_result_timeout",)
FLARES_DEFAULT_S = 300.0
SHIPPED_S = 3600.0
MARGIN = 1.25
"""For what comes beside the bytes: encoding, decoding, other sites' results in the queue."""


def seconds_of(message_bytes: int, mbps: float) -> float:
    """Seconds that a message takes one way.

    >>> seconds_of(758_000_000, 10.0)
    606.4
    """
    return message_bytes * 8 / (mbps * 1e6)


def limits_of(job: Path | None) -> dict[str, float]:
    """The time limits of a job's messages, in seconds.

    Args:
        job: the job's folder; None for what the shipped jobs set.

    Raises:
        ValueError: if the folder is no job.
    """
    if job is None:
        return dict.fromkeys(LIMITS, SHIPPED_S)
    files = sorted(job.glob("*/config/config_fed_client.json"))
    if not files:
        raise ValueError(f"{job}: expected a job with app/config/config_fed_client.json. Found none.")
    configs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {name: min(_number(config.get(name)) for config in configs) for name in LIMITS}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else FLARES_DEFAULT_S


def verdicts(message_bytes: int, mbps: float, limits: Mapping[str, float]) -> list[str]:
    """One sentence for each limit that a message would exceed; none where it gets through.

    Args:
        message_bytes: of one message.
        mbps: rate of a site's line in megabit/s.
        limits: seconds by name.
    """
    needed = MARGIN * seconds_of(message_bytes, mbps)
    return [
        f"{name}: this message takes {_minutes(needed / MARGIN)} at {mbps:g} Mbit/s; the timeout is "
        f"{_minutes(seconds)}. Set it to {math.ceil(needed / 60) * 60} s or more, or choose a lower "
        "precision."
        for name, seconds in limits.items()
        if needed > seconds
    ]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
