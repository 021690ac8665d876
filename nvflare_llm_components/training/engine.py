"""One process's training: built once, loaded and evaluated where it is parked, trained round by round."""

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.training import randomness, state, weights
from nvflare_llm_components.training.build import build_trainer, steps_per_epoch_of
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.trainer import Counts, Proximal, RoundCallback, Tally

_POSITION = "position_{}.json"


def do_nothing(*_: object) -> None:
    """What is called where nobody listens."""


@dataclass(frozen=True, kw_only=True)
class RoundOrder:
    """What to train until the next pause; plain values.

    Attributes:
        boundary: Optimizer step at which the round ends.
        horizon: Steps over which the learning rate's schedule spans.
        ahead: Steps by which the schedule moves before the round.
        proximal_mu: FedProx's coefficient; 0 for none.
    """

    boundary: int
    horizon: int
    ahead: int = 0
    proximal_mu: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One entry of the trainer's log: optimizer step, epochs so far, and values by TRL's names."""

    step: int
    epoch: float
    logs: dict[str, float]


class Engine(Protocol):
    """What a session drives: one process, or several that train as one.

    Attributes:
        order: What to train next; set before ``pause`` returns.
        poll: Called often while evaluating and training; what it raises ends them.
        on_logs: Called with each entry of the log.
    """

    order: RoundOrder
    poll: Callable[[], None]
    on_logs: Callable[[LogEntry], None]

    @property
    def has_eval_data(self) -> bool:
        """Whether :meth:`evaluate` can be called."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""

    @property
    def step(self) -> int:
        """Optimizer steps trained so far."""

    @property
    def counts(self) -> Counts:
        """What the last round processed."""

    def snapshot(self) -> weights.StateDict:
        """A copy of the weights that travel; see :func:`weights.snapshot`."""

    def present(self) -> weights.Readable:
        """The same, to be read before the training goes on: without a copy where there need not be one."""

    def under_own_names(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """``values`` with each tied weight once; see :func:`weights.under_own_names`."""

    def load(self, values: Mapping[str, Any]) -> str:
        """Write a global model into the live one; see :func:`weights.load`."""

    def evaluate(self) -> dict[str, float]:
        """TRL's metrics of the present weights on the evaluation's rows. Random states stay untouched."""

    def run(self, horizon: int, lead: int, pause: Callable[[], None]) -> None:
        """Train without end: ``pause`` is called before the first step and at each order's boundary.

        Args:
            horizon: Steps over which the learning rate's schedule spans.
            lead: Steps by which the schedule is ahead of the steps trained.
            pause: Returns when ``order`` says what to train next. Whatever it raises ends the training.
        """

    def write_state(self, folder: Path) -> None:
        """Write what a new process needs to go on from here, weights apart."""

    def save_model(self, folder: Path) -> None:
        """Write model (or adapter) and tokenizer as ``from_pretrained`` opens them."""

    def close(self) -> None:
        """Give the memory back. May be called twice."""


class TrainingEngine:
    """The training in this process.

    Args:
        settings: What the job asks for, checked.
        folder: Where TRL may write.
        saved: A state that :meth:`write_state` wrote, to go on from.

    Raises:
        FileNotFoundError: A data file is missing.
        ValueError: A setting, the data or the model cannot be used; the message says which and why.
    """

    def __init__(self, settings: TrainingSettings, folder: Path, saved: Path | None):
        self._saved, self._resets = saved, settings.optimizer_state == "reset"
        self.trainer = build_trainer(settings, folder)
        self.trainer.add_callback(RoundCallback(self._begin, lambda: self.poll(), self._log))
        self.trainer.pause, self.trainer.tally = self._pause, Tally()
        self._random_state = randomness.capture()
        self._park: Callable[[], None] = do_nothing
        self.order = RoundOrder(boundary=0, horizon=1)
        self.poll: Callable[[], None] = do_nothing
        self.on_logs: Callable[[LogEntry], None] = do_nothing

    @property
    def has_eval_data(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.trainer.eval_dataset is not None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return steps_per_epoch_of(self.trainer)

    @property
    def step(self) -> int:
        """Optimizer steps trained so far."""
        return int(self.trainer.state.global_step)

    @property
    def counts(self) -> Counts:
        """What the last round processed in this process."""
        return self.trainer.tally.counts

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds a part of the model only."""
        return bool(self.trainer.is_distributed_loading_by_transformers)

    def snapshot(self) -> weights.StateDict:
        """See :class:`Engine`."""
        return weights.snapshot(self.trainer.model)

    def present(self) -> weights.Readable:
        """See :class:`Engine`."""
        return weights.present(self.trainer.model)

    def under_own_names(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """See :class:`Engine`."""
        return weights.under_own_names(self.trainer.model, values)

    def load(self, values: Mapping[str, Any]) -> str:
        """See :class:`Engine`."""
        return weights.load(self.trainer.model, values)

    def evaluate(self) -> dict[str, float]:
        """See :class:`Engine`."""
        with randomness.preserved():
            found: dict[str, float] = self.trainer.evaluate()
            return found

    def run(self, horizon: int, lead: int, pause: Callable[[], None]) -> None:
        """See :class:`Engine`."""
        self._park = pause
        self.trainer.horizon, self.trainer.lead = horizon, lead
        randomness.restore(self._random_state)
        self.trainer.train(resume_from_checkpoint=str(self._saved) if self._saved else None)

    def write_state(self, folder: Path) -> None:
        """See :class:`Engine`."""
        state.save_training(self.trainer, self._random_state, folder)
        position = json.dumps(self.trainer.log_position())
        (folder / self._position_file).write_text(position, encoding="utf-8")

    def save_model(self, folder: Path) -> None:
        """See :class:`Engine`."""
        self.trainer.model.save_pretrained(folder)
        self.trainer.processing_class.save_pretrained(folder)

    def close(self) -> None:
        """See :class:`Engine`."""
        self.__dict__.pop("trainer", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def _position_file(self) -> str:
        return _POSITION.format(self.trainer.args.process_index)

    def _begin(self) -> None:
        # Fractions of the whole are fractions of the horizon, not of a loop without an end.
        self.trainer.state.compute_steps(self.trainer.args, self.trainer.horizon)
        if self._saved:
            text = (self._saved / self._position_file).read_text(encoding="utf-8")
            self.trainer.set_log_position(json.loads(text))
        self._pause()

    def _pause(self) -> None:
        trainer = self.trainer
        trainer.proximal = None
        if self._resets:
            trainer.optimizer.state.clear()
        self._random_state = randomness.capture()
        self._park()
        order = self.order
        if order.ahead or order.horizon != trainer.horizon:
            trainer.place_schedule(order.horizon, order.ahead)
        trainer.tally, trainer.boundary = Tally(), order.boundary
        if order.proximal_mu and self.is_sharded:
            raise ReportableError(
                "sharding: expected 'none' for FedProx, found 'full'. Change one in the job."
            )
        trainer.proximal = Proximal(trainer.model, order.proximal_mu) if order.proximal_mu else None
        randomness.restore(self._random_state)

    def _log(self, logs: dict[str, float]) -> None:
        position = self.trainer.state
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        epoch = float(position.epoch or 0.0)
        self.on_logs(LogEntry(step=position.global_step, epoch=epoch, logs=numbers))
