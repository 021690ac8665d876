"""Whether a round has enough results, and whether it still can have them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Quorum:
    """One round's sites, and those of them whose result does not count.

    Attributes:
        sites: that the round is given to.
        least: results without which there is no average.
        grace_s: seconds that the others are given when `least` are there.
        failures: reasons by site.
    """

    sites: Sequence[str]
    least: int
    grace_s: float
    failures: dict[str, str] = field(default_factory=dict)
    _enough_since: float | None = None

    def is_over(self, num_results: int) -> bool:
        """Whether there are enough results, and the others have had their time."""
        if num_results < self.least:
            return False
        self._enough_since = self._enough_since or time.monotonic()
        return time.monotonic() - self._enough_since >= self.grace_s

    @property
    def is_out_of_reach(self) -> bool:
        """Whether so many have failed that there can't be enough any more."""
        return len(self.sites) - len(self.failures) < self.least

    def sentence(self, current_round: int, num_results: int) -> str:
        """What came, and why the rest did not.

        >>> Quorum(["a", "b"], 2, 0, {"b": "out of memory"}).sentence(3, 1)
        "Round 3: results from 1 of 2 sites. Site 'b' failed: out of memory."
        """
        reasons = "".join(f" Site '{site}' failed: {why}." for site, why in sorted(self.failures.items()))
        return f"Round {current_round}: results from {num_results} of {len(self.sites)} sites.{reasons}"
