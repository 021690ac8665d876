"""One site's training over a whole job: built once, fed a global model each round."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from nvflare_llm_components.training import weights
from nvflare_llm_components.training.best import BestModel
from nvflare_llm_components.training.budget import Budget
from nvflare_llm_components.training.engine import Engine, LogEntry, TrainingEngine
from nvflare_llm_components.training.group import processes_for
from nvflare_llm_components.training.kept import KeptRound, Metrics
from nvflare_llm_components.training.metrics import Listener, MetricsLog, kept_of, perplexity
from nvflare_llm_components.training.plan import Plan
from nvflare_llm_components.training.ranks import Ranks
from nvflare_llm_components.training.rounds import RoundCount, RoundReport
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.worker import TrainingStoppedError, Worker

logger = logging.getLogger(__name__)
Aborted = Callable[[], bool]
T = TypeVar("T")
_STOP_TIMEOUT_S = 8.0  # FLARE kills an aborted process after ten
STATE_FOLDER = "trainer_state"


class SFTSession:
    """Holds model, tokenizer, data and one live trainer.

    Args:
        settings: What the job asks for.
        folder: The site's run directory of this job; curves and training state are kept there. A state that
            a lost process left there is taken up.
        listener: Called with each curve's new point.
        rounds: Rounds that an earlier session of this job has counted, if one failed.

    Attributes:
        rounds: Rounds of the job so far.
        rounds_lost: Those of them that left no training state to go on from.

    Raises:
        FileNotFoundError: A data file is missing.
        ValueError: A setting, the data or the model cannot be used; the message says which and why.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        folder: Path,
        listener: Listener | None = None,
        rounds: RoundCount | None = None,
    ):
        settings = settings.checked()
        self._settings = settings = replace(settings, num_processes=processes_for(settings))
        if settings.offload == "cpu" and settings.is_on_gpu:
            settings.checked()  # "auto" may have found one GPU
        self._kept = KeptRound(folder / STATE_FOLDER, settings)
        self._best = BestModel(folder / STATE_FOLDER / "best_local.safetensors")
        self.rounds = rounds or self._kept.rounds
        self.rounds_lost = self.rounds.done - self._kept.rounds.done
        self._engine = _engine(settings, folder, self._kept.path)
        self._engine.poll, self._engine.on_logs = self._poll, self._on_logs
        self._budget = Budget.of(settings, self._engine.steps_per_epoch)
        self._plan = Plan(self._budget, self.rounds, follows_site=settings.schedule == "site")
        self._metrics = MetricsLog(folder, listener)
        self._worker: Worker | None = None
        self._aborted: Aborted = bool
        self._round = self._missed = 0
        self._received = ""

    @property
    def has_eval_data(self) -> bool:
        """Whether global models can be evaluated here."""
        return self._engine.has_eval_data

    @property
    def is_of_federation(self) -> bool:
        """Whether the live weights are those of a round, not what the site's own model folder holds.

        A state on disk does not make them so: training begins from what is loaded, and until then from there.
        """
        return self._worker is not None

    @property
    def has_own_result(self) -> bool:
        """Whether :meth:`snapshot` has what this job trained, live or as a lost process sent it."""
        return self.is_of_federation or self._kept.path is not None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a round, rounded up."""
        return self._budget.boundary(1)

    def snapshot(self) -> weights.StateDict:
        """A copy of the weights that travel; see :func:`weights.snapshot`."""
        kept = self._kept.sent() if self._worker is None else None
        return self._call(self._engine.snapshot) if kept is None else kept

    def present(self) -> weights.Readable:
        """The same, to be read before the training goes on, without a copy where there need not be one."""
        kept = self._kept.sent() if self._worker is None else None
        return self._call(self._engine.present) if kept is None else kept

    def load(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write a global model into the live one; see :func:`weights.load`. Only between rounds.

        Returns:
            The values by the names of this site's model.
        """
        own = self._call(lambda: self._engine.under_own_names(values))
        self._received = self._call(lambda: self._engine.load(own))
        return own

    def begin_round(
        self, round_number: int, num_rounds: int | None, aborted: Aborted, first_round: int | None = None
    ) -> None:
        """Park the training at the start of a round, where weights may be loaded.

        Args:
            round_number: The federation's number of this round, for the records.
            num_rounds: Rounds of the whole job, for the learning rate's schedule; None if not known.
            aborted: Polled at each step; True ends the training with ``TrainingStoppedError``.
            first_round: The federation's number of the job's first round; None if not known.
        """
        self._aborted, self._round = aborted, round_number
        self._missed = self.rounds.begin(round_number, first_round)
        if self._worker is None:
            plan = self._plan
            plan.begin(num_rounds, first_round, self._kept.progress.get("plan"))
            self._worker = Worker(lambda: self._engine.run(plan.horizon, plan.lead, self._pause))
            self._worker.start()

    def evaluate(self, aborted: Aborted = bool, round_number: int | None = None) -> Metrics:
        """Loss and perplexity of the present weights on ``eval_data``. Random states stay untouched.

        Args:
            aborted: Polled at each batch; True ends the evaluation with ``TrainingStoppedError``.
            round_number: The round to record it under; the present one if None.
        """
        # A new process that only evaluates has trained nothing itself: its weights are of what was kept.
        kept = self._kept.report if self._worker is None else None
        present = kept.round if kept else self._round
        number = present if round_number is None else round_number
        found = self._evaluated(aborted)
        loss = found["eval_loss"]
        metrics = {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
        step = kept.end_step if kept else self._engine.step
        self._metrics.write("eval", step=step, round=number, **metrics, **kept_of(found, "eval_"))
        return metrics

    def train_round(self, proximal_mu: float = 0.0) -> RoundReport:
        """Train the local budget of the round that :meth:`begin_round` began.

        Args:
            proximal_mu: FedProx's coefficient; 0 for none.
        """
        if self._worker is None:
            raise RuntimeError("Expected begin_round before train_round.")
        started, start_step = time.monotonic(), self._engine.step
        self._engine.order = self._plan.order(self._round, start_step, proximal_mu)
        self._worker.advance()
        self.rounds.end(self._round)
        return self._report(start_step, time.monotonic() - started)

    def keep_best(self, ended: weights.Readable) -> None:
        """Evaluate the model that the round ended with, if the job asks for the best of them.

        Args:
            ended: What :meth:`present` gave.
        """
        if self._settings.keep_best_local:
            loss = self._evaluated(self._aborted)["eval_loss"]
            step = self._engine.step
            self._metrics.write("local_eval", step=step, round=self._round, eval_loss=loss)
            self._best.offer(loss, ended)

    def best(self) -> weights.StateDict | None:
        """The weights of the best model that :meth:`keep_best` has seen, in this process or a lost one."""
        return self._best.read()

    def keep(self, report: RoundReport, metrics: Metrics, ended: weights.Readable) -> None:
        """Write what a new process would need to go on: while the site is idle, or now if ``always``.

        Args:
            report: The round just trained.
            metrics: What :meth:`evaluate` found at its start.
            ended: What :meth:`present` gave; the training does not go on before it is written.
        """
        if self._settings.checkpoint == "never" or self._worker is None:
            return
        if self._settings.checkpoint == "always":
            self._worker.call(lambda: self._write(report, metrics, ended))
        else:
            self._worker.submit(lambda: self._write_quietly(report, metrics, ended))

    def settle(self) -> None:
        """Wait until what :meth:`keep` was given is on disk."""
        self._call(bool)

    def kept_round(self, round_number: int) -> tuple[RoundReport, Metrics] | None:
        """What a lost process had done for this round and this global model, but may not have sent.

        None if the round is yet to be trained; otherwise :meth:`snapshot` has its weights.
        """
        return None if self._worker else self._kept.answer(round_number, self._received)

    def record(self, report: RoundReport, task_seconds: float, num_rounds: int | None = None) -> None:
        """Add the round's line to ``metrics.jsonl``, with the number of rounds where it is known."""
        self._metrics.write("round", **asdict(report), task_seconds=task_seconds, num_rounds=num_rounds)

    def save_model(self, folder: Path) -> Path:
        """Write model (or adapter) and tokenizer as ``from_pretrained`` opens them; returns ``folder``."""
        self._engine.save_model(folder)
        return folder

    def close(self) -> None:
        """End the training thread, close the files and give the memory back. May be called twice."""
        if self._worker and not self._worker.stop(_STOP_TIMEOUT_S):
            logger.warning("The training thread did not end within %s s.", _STOP_TIMEOUT_S)
        self._worker = None
        self._metrics.close()
        self._engine.close()

    def forget(self) -> None:
        """Remove the state on disk: the job is over."""
        self._kept.clear()

    def _call(self, function: Callable[[], T]) -> T:
        """Run in the parked thread, after whatever it is still writing."""
        return self._worker.call(function) if self._worker else function()

    def _evaluated(self, aborted: Aborted) -> Metrics:
        self._aborted = aborted
        return self._call(self._engine.evaluate)

    def _report(self, start_step: int, seconds: float) -> RoundReport:
        counts, end_step = self._engine.counts, self._engine.step
        return RoundReport(
            round=self._round,
            start_step=start_step,
            end_step=end_step,
            num_steps=end_step - start_step,
            num_tokens=counts.num_tokens,
            num_examples=counts.num_examples,
            train_loss=counts.loss_sum / max(end_step - start_step, 1),
            train_seconds=seconds,
            missed_rounds=self._missed,
        )

    def _write(self, report: RoundReport, metrics: Metrics, ended: weights.Readable) -> None:
        self._kept.write(
            report,
            ended,
            self._engine.write_state,
            rounds=asdict(self.rounds),
            plan=self._plan.position(),
            received=self._received,
            metrics=metrics,
        )

    def _write_quietly(self, report: RoundReport, metrics: Metrics, ended: weights.Readable) -> None:
        try:
            self._write(report, metrics, ended)
        except Exception:  # a full disk is a RuntimeError to torch, a SafetensorError to safetensors
            logger.exception("The training state could not be written; a lost process would start afresh.")

    def _pause(self) -> None:
        if self._worker is None:
            raise TrainingStoppedError
        self._worker.park()

    def _poll(self) -> None:
        if self._aborted():
            raise TrainingStoppedError

    def _on_logs(self, entry: LogEntry) -> None:
        logs = entry.logs
        if "loss" in logs:
            self._metrics.write(
                "train",
                step=entry.step,
                round=self._round,
                epoch=entry.epoch,
                loss=float(logs["loss"]),
                learning_rate=float(logs["learning_rate"]),
                **kept_of(logs),
            )


def _engine(settings: TrainingSettings, folder: Path, saved: Path | None) -> Engine:
    """One process trains in this one; several have this one for a front end."""
    if settings.num_processes == 1:
        return TrainingEngine(settings, folder / STATE_FOLDER, saved)
    return Ranks(settings, folder, folder / STATE_FOLDER, saved)
