"""What of a training outlives its process: the round that was trained last, and how to go on from it."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvflare_llm_components.training import state
from nvflare_llm_components.training.rounds import RoundCount, RoundReport
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.weights import Readable, StateDict

logger = logging.getLogger(__name__)
Metrics = dict[str, float]


class KeptRound:
    """The state that a lost process left on disk, and the place of those that this one leaves.

    Args:
        folder: Where it lies.
        settings: With ``checkpoint`` "never" nothing is taken up; nor is the state of another number of
            processes, but for its rounds.

    Attributes:
        path: The state that the training goes on from; None for none.
        rounds: The rounds of the job that the lost process counted.
        progress: What else it knew; empty for none.

    Raises:
        ReportableError: The state is of another version.
    """

    def __init__(self, folder: Path, settings: TrainingSettings):
        self._states, self._num_processes = state.StateFolder(folder), settings.num_processes
        self.path = None if settings.checkpoint == "never" else self._states.latest()
        self.progress: dict[str, Any] = state.read_progress(self.path) if self.path else {}
        self.rounds: RoundCount = self.progress.get("rounds") or RoundCount()
        if self.progress.get("num_processes", self._num_processes) != self._num_processes:
            logger.warning(
                "The training state is one of %s processes, and %s train here now: optimizer and order of "
                "the rows start anew from the round's weights; the learning rate's schedule goes on where it "
                "was.",
                *(self.progress["num_processes"], self._num_processes),
            )
            self.progress = {}
        if not self.progress:
            self.path = None

    @property
    def report(self) -> RoundReport | None:
        """What the lost process did in its last round."""
        return RoundReport(**self.progress["report"]) if self.progress else None

    def sent(self) -> StateDict | None:
        """The weights that its last round ended with."""
        return state.read_sent(self.path) if self.path else None

    def answer(self, round_number: int, received: str) -> tuple[RoundReport, Metrics] | None:
        """What it did in a round, and found before it, if that was this round from this global model."""
        report = self.report
        if report is None or (report.round, self.progress["received"]) != (round_number, received):
            return None
        return report, self.progress["metrics"]

    def write(
        self,
        report: RoundReport,
        sent: Readable,
        write_state: Callable[[Path], None],
        **progress: Any,
    ) -> None:
        """Put the state after a round in the place of the one on disk.

        Args:
            report: Of the round.
            sent: The weights it ended with.
            write_state: Writes optimizer, schedule and random state into a folder.
            progress: What :attr:`progress` shall have, as plain values, beside the report.
        """
        told = {**progress, "report": asdict(report), "num_processes": self._num_processes}

        def fill(folder: Path) -> None:
            write_state(folder)
            state.save_progress(folder, told, sent)

        self._states.write(report.end_step, fill)

    def clear(self) -> None:
        """Remove the state on disk: the job is over."""
        self._states.clear()
