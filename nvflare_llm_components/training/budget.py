"""How many optimizer steps a round has, so that rounds add up to one centralized training."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A site's local budget for each round.

    Attributes:
        local_steps: Optimizer steps a round; wins over epochs.
        local_epochs: Passes over the site's rows a round, may be fractional.
        steps_per_epoch: Optimizer steps in one pass.
    """

    local_steps: int | None
    local_epochs: float
    steps_per_epoch: int

    def boundary(self, rounds: int) -> int:
        """The optimizer step at which ``rounds`` rounds are complete.

        Epoch budgets are rounded up once on the sum, as a centralized run of the same total would be; a
        round has at least one step.
        """
        if self.local_steps is not None:
            return rounds * self.local_steps
        steps = max(self.local_epochs * self.steps_per_epoch, 1.0)
        # Rounding guards against 3 x 0.1 x 10 = 3.0000000000000004.
        return math.ceil(round(rounds * steps, 6))


def steps_per_epoch(num_rows: int, batch_size: int, accumulation: int, drop_last: bool) -> int:
    """Optimizer steps in one pass over ``num_rows`` rows on one device, at least 1."""
    num_batches = num_rows // batch_size if drop_last else math.ceil(num_rows / batch_size)
    return max(math.ceil(num_batches / accumulation), 1)
