"""A site's rounds: what it did in each, how many it trained, and how many of the federation's it missed."""

from dataclasses import dataclass
from typing import Any

_LIMIT = 1 << 31


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What a site did in one round; a line of ``metrics.jsonl``. Times in seconds.

    ``missed_rounds`` of the federation passed without this site since the last one that it trained.
    """

    round: int
    start_step: int
    end_step: int
    num_steps: int
    num_tokens: int
    num_examples: int
    train_loss: float
    train_seconds: float
    missed_rounds: int = 0


@dataclass
class RoundCount:
    """Counts rounds from the job's first one on.

    Attributes:
        first: The federation's number of the round that counts as the first; None before any round.
        last: The federation's number of the last round trained here; None before any.
        done: Rounds trained here.
        missed: Rounds of the federation that passed without this site.
    """

    first: int | None = None
    last: int | None = None
    done: int = 0
    missed: int = 0

    @classmethod
    def read(cls, values: dict[str, Any]) -> "RoundCount":
        """The counts that ``dataclasses.asdict`` gave.

        Raises:
            TypeError: A key is unknown, or they are none at all.
            ValueError: One is no whole number in its range. ``first`` may be below 0: a second workflow
                counts anew.
        """
        found = cls(**values)
        counts = (found.done, found.missed, 0 if found.last is None else found.last)
        first = 0 if found.first is None else found.first
        if any(type(count) is not int or abs(count) >= _LIMIT for count in (*counts, first)):
            raise ValueError("expected whole numbers")
        if min(counts) < 0:
            raise ValueError("expected numbers from 0")
        return found

    @property
    def passed(self) -> int:
        """Rounds of the federation before the present one."""
        return self.done + self.missed

    def begin(self, number: int, first: int | None = None) -> int:
        """Come to a round.

        Args:
            number: The federation's number of it.
            first: The number of the job's first round; None if the workflow does not tell, then the first
                that this site sees. What was counted before wins: a resumed job has a later first round.

        Returns:
            How many rounds were missed since the last one trained here.
        """
        if self.first is None:
            self.first = number if first is None else min(first, number)
        if self.last is not None and number <= self.last:
            # A round given again, or a second workflow that counts anew: nothing is missed.
            self.first = number - self.passed
        missed = number - self.first - self.passed
        self.missed += missed
        return missed

    def end(self, number: int) -> None:
        """The round is trained."""
        self.last, self.done = number, self.done + 1
