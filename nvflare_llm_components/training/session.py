"""One site's training over a whole job: built once, fed a global model each round."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from nvflare_llm_components.training import randomness, weights
from nvflare_llm_components.training.budget import Budget, steps_per_epoch
from nvflare_llm_components.training.metrics import Listener, MetricsLog, perplexity
from nvflare_llm_components.training.model import load_model, load_peft_config, load_tokenizer
from nvflare_llm_components.training.rows import load_rows
from nvflare_llm_components.training.settings import TrainingSettings, build_sft_config
from nvflare_llm_components.training.trainer import RoundCallback, RoundTrainer, Tally
from nvflare_llm_components.training.worker import TrainingStoppedError, Worker

logger = logging.getLogger(__name__)
Metrics = dict[str, float]
_STOP_TIMEOUT_S = 8.0  # FLARE kills an aborted process after ten


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
        folder: The site's run directory of this job; curves and training state are kept there.
        listener: Called with each curve's new point.

    Raises:
        FileNotFoundError: A data file is missing.
        ValueError: A setting, the data or the model cannot be used; the message says which and why.
    """

    def __init__(self, settings: TrainingSettings, folder: Path, listener: Listener | None = None):
        self._settings = settings = settings.checked()
        self._trainer = _build_trainer(settings, folder)
        callback = RoundCallback(self._on_begin, self._poll, self._on_logs)
        self._trainer.add_callback(callback)
        self._trainer.remove_callback(PrinterCallback)
        self._trainer.pause = self._pause
        self._random_state = randomness.capture()
        self._metrics = MetricsLog(folder, listener)
        self._budget = _budget(self._trainer, settings)
        self._worker: Worker | None = None
        self._aborted: Callable[[], bool] = bool
        self._round = 0
        self._rounds_done = 0

    @property
    def has_eval_data(self) -> bool:
        """Whether global models can be evaluated here."""
        return self._trainer.eval_dataset is not None

    def snapshot(self) -> weights.StateDict:
        """A copy of the weights that travel; see :func:`weights.snapshot`."""
        return weights.snapshot(self._trainer.model)

    def load(self, values: Mapping[str, Any]) -> None:
        """Write a global model into the live one; see :func:`weights.load`. Only between rounds."""
        weights.load(self._trainer.model, values)

    def begin_round(self, round_number: int, num_rounds: int | None, aborted: Callable[[], bool]) -> None:
        """Park the training at the start of a round, where weights may be loaded.

        Args:
            round_number: The federation's number of this round, for the records.
            num_rounds: Rounds of the whole job, for the learning rate's schedule; None if not known.
            aborted: Polled at each step; True ends the training with ``TrainingStoppedError``.
        """
        self._aborted, self._round = aborted, round_number
        if self._worker is None:
            self._trainer.horizon = self._budget.boundary(max(num_rounds or 1, 1))
            self._worker = Worker(self._train)
            self._worker.start()

    def evaluate(self, aborted: Callable[[], bool] = bool, round_number: int | None = None) -> Metrics:
        """Loss and perplexity of the present weights on ``eval_data``. Random states stay untouched.

        Args:
            aborted: Polled at each batch; True ends the evaluation with ``TrainingStoppedError``.
            round_number: The round to record it under; the present one if None.
        """
        self._aborted = aborted
        number = self._round if round_number is None else round_number
        run = self._worker.call if self._worker else _call
        with randomness.preserved():
            loss = float(run(self._trainer.evaluate)["eval_loss"])
        metrics = {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
        self._metrics.write("eval", step=self._trainer.state.global_step, round=number, **metrics)
        return metrics

    def train_round(self) -> RoundReport:
        """Train the local budget of the round that :meth:`begin_round` began."""
        trainer, started = self._trainer, time.monotonic()
        start_step = trainer.state.global_step
        trainer.tally = Tally()
        trainer.boundary = self._budget.boundary(self._rounds_done + 1)
        if self._worker is None:
            raise RuntimeError("Expected begin_round before train_round.")
        self._worker.advance()
        self._rounds_done += 1
        num_steps = trainer.state.global_step - start_step
        return RoundReport(
            round=self._round,
            start_step=start_step,
            end_step=trainer.state.global_step,
            num_steps=num_steps,
            num_tokens=trainer.tally.num_tokens,
            num_examples=trainer.tally.num_examples,
            train_loss=float(trainer.tally.loss_sum) / max(num_steps, 1),
            train_seconds=time.monotonic() - started,
        )

    def record(self, report: RoundReport, task_seconds: float) -> None:
        """Add the round's line to ``metrics.jsonl``."""
        self._metrics.write("round", **asdict(report), task_seconds=task_seconds)

    def save_model(self, folder: Path) -> Path:
        """Write model (or adapter) and tokenizer as ``from_pretrained`` opens them; returns ``folder``."""
        self._trainer.model.save_pretrained(folder)
        self._trainer.processing_class.save_pretrained(folder)
        return folder

    def close(self) -> None:
        """End the training thread and close the files."""
        if self._worker and not self._worker.stop(_STOP_TIMEOUT_S):
            logger.warning("The training thread did not end within %s s.", _STOP_TIMEOUT_S)
        self._worker = None
        self._metrics.close()

    def _train(self) -> None:
        randomness.restore(self._random_state)
        self._trainer.train()

    def _on_begin(self) -> None:
        # Fractions of the whole are fractions of the horizon, not of a loop without an end.
        self._trainer.state.compute_steps(self._trainer.args, self._trainer.horizon)
        self._pause()

    def _pause(self) -> None:
        if self._worker is None:
            raise TrainingStoppedError
        with randomness.preserved():
            self._worker.park()

    def _poll(self) -> None:
        if self._aborted():
            raise TrainingStoppedError

    def _on_logs(self, logs: dict[str, float]) -> None:
        if "loss" in logs:
            state = self._trainer.state
            self._metrics.write(
                "train",
                step=state.global_step,
                round=self._round,
                epoch=state.epoch,
                loss=float(logs["loss"]),
                learning_rate=float(logs["learning_rate"]),
            )


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _build_trainer(settings: TrainingSettings, folder: Path) -> RoundTrainer:
    """Data first: what is cheap to check fails before a model is loaded."""
    train_rows = load_rows(settings.train_data, "train_data")
    eval_rows = load_rows(settings.eval_data, "eval_data") if settings.eval_data else None
    config = build_sft_config(settings.sft_config, folder / "trainer_state")
    peft_config = load_peft_config(settings.peft_config) if settings.peft_config else None
    tokenizer = load_tokenizer(settings.model_name_or_path)
    _check_chat_template(train_rows, tokenizer, config)
    model = load_model(settings.model_name_or_path, settings.model_kwargs)
    try:
        return RoundTrainer(
            model=model,
            args=config,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    except ValueError as error:
        what = "peft_config" if "odules" in str(error) and peft_config else "sft_config"
        modules = sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if "." in name})
        known = f" The model's modules are {', '.join(modules)}." if what == "peft_config" else ""
        raise ValueError(f"{what}: the trainer cannot be built: {error}{known}") from error


def _check_chat_template(rows: Any, tokenizer: Any, config: Any) -> None:
    is_chat = isinstance(rows[0].get("prompt"), list)
    if is_chat and tokenizer.chat_template is None and config.chat_template_path is None:
        raise ValueError(
            "train_data: expected a tokenizer with a chat template for rows with messages, found none. "
            "Use a chat model, or prepare rows of input and output."
        )


def _budget(trainer: RoundTrainer, settings: TrainingSettings) -> Budget:
    args = trainer.args
    num_rows = len(trainer.train_dataset)
    steps = steps_per_epoch(
        num_rows,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.dataloader_drop_last,
    )
    return Budget(
        local_steps=settings.local_steps, local_epochs=settings.local_epochs or 1.0, steps_per_epoch=steps
    )
