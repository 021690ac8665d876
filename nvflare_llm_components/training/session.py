"""One site's training over a whole job: built once, fed a global model each round."""

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from nvflare_llm_components.training import randomness, state, weights
from nvflare_llm_components.training.best import BestModel
from nvflare_llm_components.training.build import build_trainer, local_budget
from nvflare_llm_components.training.metrics import Listener, MetricsLog, perplexity
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.trainer import Proximal, RoundCallback, Tally
from nvflare_llm_components.training.worker import TrainingStoppedError, Worker

logger = logging.getLogger(__name__)
Metrics = dict[str, float]
Aborted = Callable[[], bool]
T = TypeVar("T")
_STOP_TIMEOUT_S = 8.0  # FLARE kills an aborted process after ten
STATE_FOLDER = "trainer_state"


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What a site did in one round; a line of ``metrics.jsonl``. Times in seconds."""

    round: int
    start_step: int
    end_step: int
    num_steps: int
    num_tokens: int
    num_examples: int
    train_loss: float
    train_seconds: float


class SFTSession:
    """Holds model, tokenizer, data and one live trainer.

    Args:
        settings: What the job asks for.
        folder: The site's run directory of this job; curves and training state are kept there. A state that
            a lost process left there is taken up.
        listener: Called with each curve's new point.

    Raises:
        FileNotFoundError: A data file is missing.
        ValueError: A setting, the data or the model cannot be used; the message says which and why.
    """

    def __init__(self, settings: TrainingSettings, folder: Path, listener: Listener | None = None):
        self._settings = settings = settings.checked()
        self._states = state.StateFolder(folder / STATE_FOLDER)
        self._best = BestModel(folder / STATE_FOLDER / "best_local.safetensors")
        self._saved = None if settings.checkpoint == "never" else self._states.latest()
        self._progress = state.read_progress(self._saved) if self._saved else {}
        self._trainer = build_trainer(settings, folder / STATE_FOLDER)
        self._trainer.add_callback(RoundCallback(self._on_begin, self._poll, self._on_logs))
        self._trainer.pause = self._pause
        self._random_state = randomness.capture()
        self._metrics = MetricsLog(folder, listener)
        self._budget = local_budget(self._trainer, settings)
        self._worker: Worker | None = None
        self._aborted: Aborted = bool
        self._round = 0
        self._received = ""
        self._rounds_done = int(self._progress.get("rounds_done", 0))

    @property
    def has_eval_data(self) -> bool:
        """Whether global models can be evaluated here."""
        return self._trainer.eval_dataset is not None

    def snapshot(self) -> weights.StateDict:
        """A copy of the weights that travel; see :func:`weights.snapshot`."""
        if self._worker is None and self._saved:
            return state.read_sent(self._saved)
        return self._call(lambda: weights.snapshot(self._trainer.model))

    def load(self, values: Mapping[str, Any]) -> None:
        """Write a global model into the live one; see :func:`weights.load`. Only between rounds."""
        self._received = self._call(lambda: weights.load(self._trainer.model, values))

    def begin_round(self, round_number: int, num_rounds: int | None, aborted: Aborted) -> None:
        """Park the training at the start of a round, where weights may be loaded.

        Args:
            round_number: The federation's number of this round, for the records.
            num_rounds: Rounds of the whole job, for the learning rate's schedule; None if not known.
            aborted: Polled at each step; True ends the training with ``TrainingStoppedError``.
        """
        self._aborted, self._round = aborted, round_number
        if self._worker is None:
            planned = self._budget.boundary(max(num_rounds or 1, 1))
            self._trainer.horizon = int(self._progress.get("horizon", planned))
            self._worker = Worker(self._train)
            self._worker.start()

    def evaluate(self, aborted: Aborted = bool, round_number: int | None = None) -> Metrics:
        """Loss and perplexity of the present weights on ``eval_data``. Random states stay untouched.

        Args:
            aborted: Polled at each batch; True ends the evaluation with ``TrainingStoppedError``.
            round_number: The round to record it under; the present one if None.
        """
        number = self._round if round_number is None else round_number
        loss = self._eval_loss(aborted)
        metrics = {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
        self._metrics.write("eval", step=self._trainer.state.global_step, round=number, **metrics)
        return metrics

    def train_round(self, proximal_mu: float = 0.0) -> RoundReport:
        """Train the local budget of the round that :meth:`begin_round` began.

        Args:
            proximal_mu: FedProx's coefficient; 0 for none.
        """
        if self._worker is None:
            raise RuntimeError("Expected begin_round before train_round.")
        trainer, started = self._trainer, time.monotonic()
        start_step = trainer.state.global_step
        trainer.tally = Tally()
        trainer.proximal = Proximal(trainer.model, proximal_mu) if proximal_mu else None
        trainer.boundary = self._budget.boundary(self._rounds_done + 1)
        if trainer.boundary > trainer.horizon:
            logger.warning(
                "Round %d is beyond the planned %d steps: the learning rate's schedule is stretched to %d.",
                *(self._round, trainer.horizon, trainer.boundary),
            )
            self._call(lambda: trainer.stretch_schedule(trainer.boundary))
        self._worker.advance()
        self._rounds_done += 1
        trainer.proximal = None
        if self._settings.optimizer_state == "reset":
            trainer.optimizer.state.clear()
        return self._report(start_step, time.monotonic() - started)

    def keep_best(self, sent: weights.StateDict) -> None:
        """Evaluate the model that the round ended with, if the job asks for the best of them.

        Args:
            sent: Its weights.
        """
        if self._settings.keep_best_local:
            loss = self._eval_loss(self._aborted)
            step = self._trainer.state.global_step
            self._metrics.write("local_eval", step=step, round=self._round, eval_loss=loss)
            self._best.offer(loss, sent)

    def best(self) -> weights.StateDict | None:
        """The weights of the best model that :meth:`keep_best` has seen, in this process or a lost one."""
        return self._best.read()

    def keep(self, report: RoundReport, metrics: Metrics, sent: weights.StateDict) -> None:
        """Write what a new process would need to go on: while the site is idle, or now if ``always``.

        Args:
            report: The round just trained.
            metrics: What :meth:`evaluate` found at its start.
            sent: The weights it ended with.
        """
        if self._settings.checkpoint == "never" or self._worker is None:
            return
        if self._settings.checkpoint == "always":
            self._worker.call(lambda: self._write(report, metrics, sent))
        else:
            self._worker.submit(lambda: self._write_quietly(report, metrics, sent))

    def settle(self) -> None:
        """Wait until what :meth:`keep` was given is on disk."""
        self._call(bool)

    def kept_round(self, round_number: int) -> tuple[RoundReport, Metrics] | None:
        """What a lost process had done for this round and this global model, but may not have sent.

        None if the round is yet to be trained; otherwise :meth:`snapshot` has its weights.
        """
        if self._worker is not None or not self._progress:
            return None
        report = RoundReport(**self._progress["report"])
        is_same = (report.round, self._progress["received"]) == (round_number, self._received)
        return (report, self._progress["metrics"]) if is_same else None

    def record(self, report: RoundReport, task_seconds: float) -> None:
        """Add the round's line to ``metrics.jsonl``."""
        self._metrics.write("round", **asdict(report), task_seconds=task_seconds)

    def save_model(self, folder: Path) -> Path:
        """Write model (or adapter) and tokenizer as ``from_pretrained`` opens them; returns ``folder``."""
        self._trainer.model.save_pretrained(folder)
        self._trainer.processing_class.save_pretrained(folder)
        return folder

    def close(self) -> None:
        """End the training thread, close the files and give the memory back. May be called twice."""
        if self._worker and not self._worker.stop(_STOP_TIMEOUT_S):
            logger.warning("The training thread did not end within %s s.", _STOP_TIMEOUT_S)
        self._worker = None
        self._metrics.close()
        self.__dict__.pop("_trainer", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def forget(self) -> None:
        """Remove the state on disk: the job is over."""
        self._states.clear()

    def _call(self, function: Callable[[], T]) -> T:
        """Run in the parked thread, after whatever it is still writing."""
        return self._worker.call(function) if self._worker else function()

    def _eval_loss(self, aborted: Aborted) -> float:
        self._aborted = aborted
        with randomness.preserved():
            return float(self._call(self._trainer.evaluate)["eval_loss"])

    def _report(self, start_step: int, seconds: float) -> RoundReport:
        tally, end_step = self._trainer.tally, self._trainer.state.global_step
        return RoundReport(
            round=self._round,
            start_step=start_step,
            end_step=end_step,
            num_steps=end_step - start_step,
            num_tokens=tally.num_tokens,
            num_examples=tally.num_examples,
            train_loss=float(tally.loss_sum) / max(end_step - start_step, 1),
            train_seconds=seconds,
        )

    def _write(self, report: RoundReport, metrics: Metrics, sent: weights.StateDict) -> None:
        trainer = self._trainer
        progress = {
            "rounds_done": self._rounds_done,
            "horizon": trainer.horizon,
            "received": self._received,
            "report": asdict(report),
            "metrics": metrics,
            "log_position": trainer.log_position(),
        }

        def fill(folder: Path) -> None:
            state.save_training(trainer, self._random_state, folder)
            state.save_progress(folder, progress, sent)

        self._states.write(report.end_step, fill)

    def _write_quietly(self, report: RoundReport, metrics: Metrics, sent: weights.StateDict) -> None:
        try:
            self._write(report, metrics, sent)
        except Exception:  # a full disk is a RuntimeError to torch, a SafetensorError to safetensors
            logger.exception("The training state could not be written; a lost process would start afresh.")

    def _train(self) -> None:
        randomness.restore(self._random_state)
        self._trainer.train(resume_from_checkpoint=str(self._saved) if self._saved else None)

    def _on_begin(self) -> None:
        # Fractions of the whole are fractions of the horizon, not of a loop without an end.
        self._trainer.state.compute_steps(self._trainer.args, self._trainer.horizon)
        if self._progress:
            self._trainer.set_log_position(self._progress["log_position"])
        self._pause()

    def _pause(self) -> None:
        if self._worker is None:
            raise TrainingStoppedError
        self._random_state = randomness.capture()
        self._worker.park()
        randomness.restore(self._random_state)

    def _poll(self) -> None:
        if self._aborted():
            raise TrainingStoppedError

    def _on_logs(self, logs: dict[str, float]) -> None:
        if "loss" in logs:
            position = self._trainer.state
            self._metrics.write(
                "train",
                step=position.global_step,
                round=self._round,
                epoch=position.epoch,
                loss=float(logs["loss"]),
                learning_rate=float(logs["learning_rate"]),
            )
