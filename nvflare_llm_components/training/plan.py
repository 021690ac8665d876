"""Where each round ends, and where the learning rate's schedule stands in it."""

import logging

from nvflare_llm_components.training.budget import Budget
from nvflare_llm_components.training.engine import RoundOrder
from nvflare_llm_components.training.rounds import RoundCount

logger = logging.getLogger(__name__)


class Plan:
    """A job's optimizer steps on one site.

    Args:
        budget: Steps of each round.
        rounds: Rounds so far; counted by the session.
        follows_site: The schedule counts the rounds trained here, not the federation's.

    Attributes:
        horizon: Steps over which the schedule spans.
        lead: Steps by which the schedule is ahead of those trained here: of rounds that were missed.
    """

    def __init__(self, budget: Budget, rounds: RoundCount, follows_site: bool):
        self._budget, self._rounds, self._follows_site = budget, rounds, follows_site
        self._told = rounds.missed
        self.horizon = self.lead = 0

    def begin(
        self, num_rounds: int | None, first_round: int | None, position: dict[str, int] | None = None
    ) -> None:
        """Before the first round of this process.

        Args:
            num_rounds: Rounds of the job; None if not known.
            first_round: The federation's number of its first one; None if not known.
            position: What :meth:`position` gave in a lost process.
        """
        # A job that continues another one counts only its own rounds.
        earlier = max((first_round or 0) - (self._rounds.first or 0), 0)
        self.horizon = self._budget.boundary(earlier + max(num_rounds or 1, 1))
        if position:
            self.horizon, self.lead = position["horizon"], position["lead"]

    def position(self) -> dict[str, int]:
        """What a new process needs to go on; plain values."""
        return {"horizon": self.horizon, "lead": self.lead}

    def order(self, number: int, start_step: int, proximal_mu: float) -> RoundOrder:
        """The round that begins now, at optimizer step ``start_step``."""
        before = self._rounds.done if self._follows_site else self._rounds.passed
        begins, ends = self._budget.boundary(before), self._budget.boundary(before + 1)
        missed, self._told = self._rounds.missed - self._told, self._rounds.missed
        if missed:
            logger.warning(
                "Round %d: this site missed %d rounds of the federation; the learning rate's schedule goes "
                "on at step %d of %d.",
                *(number, missed, begins, self.horizon),
            )
        if ends > self.horizon:
            logger.warning(
                "Round %d is beyond the planned %d steps: the learning rate's schedule is stretched to %d.",
                *(number, self.horizon, ends),
            )
        ahead = begins - start_step - self.lead
        self.horizon, self.lead = max(ends, self.horizon), self.lead + ahead
        return RoundOrder(
            boundary=start_step + ends - begins, horizon=self.horizon, ahead=ahead, proximal_mu=proximal_mu
        )
