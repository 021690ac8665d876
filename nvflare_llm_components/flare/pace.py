"""How often a curve's points travel: FLARE sends each as an event of its own, milliseconds of both ends."""

import time
from collections.abc import Callable

PERIOD_S = 1.0
STEP_TAG = "train/"
"""Of the tags that come with each step; what comes once a round always travels."""


class Pace:
    """Lets the points of one step through, and those of the next not before a period is over.

    >>> times = iter([0.0, 0.4, 1.1])
    >>> pace = Pace(1.0, lambda: next(times))
    >>> [pace.takes(tag, step) for step in (1, 2, 3) for tag in ("train/loss", "train/grad_norm")]
    [True, True, False, False, True, True]
    >>> pace.takes("eval/loss", 3)
    True
    """

    def __init__(self, period_s: float = PERIOD_S, clock: Callable[[], float] = time.monotonic):
        self._period_s, self._clock = period_s, clock
        self._step: int | None = None
        self._taken_step: int | None = None
        self._taken_at = float("-inf")

    def takes(self, tag: str, step: int) -> bool:
        """Whether a point travels."""
        if not tag.startswith(STEP_TAG):
            return True
        if step != self._step:
            self._step, now = step, self._clock()
            if now - self._taken_at >= self._period_s:
                self._taken_step, self._taken_at = step, now
        return step == self._taken_step
