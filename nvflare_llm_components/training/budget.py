"""How many optimizer steps a round has, so that rounds add up to one centralized training."""

import math
from dataclasses import dataclass

from nvflare_llm_components.training.settings import TrainingSettings


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

    @classmethod
    def of(cls, settings: TrainingSettings, steps_per_epoch: int) -> "Budget":
        """The budget that a job asks for."""
        return cls(
            local_steps=settings.local_steps,
            local_epochs=settings.local_epochs or 1.0,
            steps_per_epoch=steps_per_epoch,
        )

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


@dataclass(frozen=True, kw_only=True)
class EpochRows:
    """How many rows the steps of several processes train, without those that fill up a last batch.

    Attributes:
        num_rows: Rows that one pass trains.
        rows_per_step: Rows of one optimizer step of all processes.
        steps_per_epoch: Optimizer steps in one pass.
    """

    num_rows: int
    rows_per_step: int
    steps_per_epoch: int

    def until(self, step: int) -> int:
        """Rows trained in the first ``step`` steps."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.num_rows + min(rest * self.rows_per_step, self.num_rows)


def batches_per_epoch(num_rows: int, batch_size: int, drop_last: bool, num_processes: int = 1) -> int:
    """Batches of each process in one pass over all rows; 0 if there is no whole one to keep for each.

    The last ones are filled up with rows from the beginning, so that every process has as many.
    """
    if drop_last:
        return num_rows // batch_size // num_processes
    return math.ceil(math.ceil(num_rows / batch_size) / num_processes)


def steps_per_epoch(num_batches: int, accumulation: int) -> int:
    """Optimizer steps in one pass of ``num_batches`` batches, at least 1."""
    return max(math.ceil(num_batches / accumulation), 1)
