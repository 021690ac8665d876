"""TRL's trainer with a place to stop at each round boundary."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import IntervalStrategy
from trl import SFTTrainer

from nvflare_llm_components.training.sharded import load_parts, parts_of


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one round has processed: rows, their tokens, and the sum of its steps' losses."""

    num_examples: int = 0
    num_tokens: int = 0
    loss_sum: float = 0.0


class Tally:
    """Counts while a round is trained."""

    def __init__(self) -> None:
        self.num_examples = 0
        self.num_tokens = 0
        self.loss_sum: torch.Tensor | float = 0.0

    @property
    def counts(self) -> Counts:
        """Plain values."""
        return Counts(
            num_examples=self.num_examples, num_tokens=self.num_tokens, loss_sum=float(self.loss_sum)
        )

    def add(self, inputs: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        """Count one micro-batch; ``loss`` is its share of the step's loss."""
        mask = inputs.get("attention_mask")
        if mask is not None:
            self.num_examples += len(mask)
            self.num_tokens += int(mask.sum())
        else:
            # Rows are laid end to end. Padding stays at position 0, as the first token of a row does, which
            # carries no loss: a row that teaches something has a position 1.
            positions = inputs["position_ids"]
            num_rows = int((positions == 1).sum())
            self.num_examples += num_rows
            self.num_tokens += int((positions > 0).sum()) + num_rows
        self.loss_sum = self.loss_sum + loss.detach()


class Proximal:
    """FedProx's pull towards the weights that a round began with: ``mu / 2 * |w - w_0|^2``."""

    def __init__(self, model: torch.nn.Module, mu: float):
        self._mu = mu
        self._origin = [
            (value, value.detach().clone()) for value in model.parameters() if value.requires_grad
        ]

    def loss(self) -> torch.Tensor:
        """The penalty of the present weights, a float32 scalar."""
        distances = [(value - origin).float().square().sum() for value, origin in self._origin]
        return torch.stack(distances).sum() * (self._mu / 2)


class RoundTrainer(SFTTrainer):
    """An ``SFTTrainer`` whose one ``train()`` call pauses at round boundaries.

    Attributes:
        boundary: Optimizer step at which ``pause`` is called next, after that step's log.
        horizon: Optimizer steps of the whole job, for the learning rate's schedule.
        lead: Steps by which the schedule is ahead of those trained: of rounds that were missed.
        pause: Called at the boundary.
        tally: Counts of the present round.
        proximal: FedProx's penalty in the present round, if the server asked for it.
    """

    boundary: int = 0
    horizon: int = 1
    lead: int = 0
    pause: Callable[[], None]
    tally: Tally
    proximal: Proximal | None = None
    lr_scheduler: Any

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The schedule spans the job's rounds; the loop itself has no end, so that a job may have more."""
        scheduler: LRScheduler = super().create_scheduler(self.horizon, optimizer)
        return scheduler

    def place_schedule(self, horizon: int, ahead: int = 0) -> None:
        """Move the schedule by ``ahead`` steps, and span it over ``horizon`` steps from there on."""
        self.horizon, self.lead = horizon, self.lead + ahead
        position = self.lr_scheduler.state_dict()
        position["last_epoch"] += ahead
        self.lr_scheduler = None
        new = self.create_scheduler(horizon)
        new.load_state_dict(position)
        if isinstance(new, LambdaLR):
            factors = [factor(new.last_epoch) for factor in new.lr_lambdas]
            new._last_lr = [base * factor for base, factor in zip(new.base_lrs, factors, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, new._last_lr, strict=True):
                group["lr"] = rate
        self.callback_handler.lr_scheduler = new

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, counted."""
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.tally.add(inputs, loss)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, and FedProx's penalty while training."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.proximal is None or not self.model.training:
            return loss
        # With num_items_in_batch the trainer sums micro-batches, else it averages them.
        shares = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        return loss + self.proximal.loss() / shares

    def log_position(self) -> dict[str, Any]:
        """What is summed up for the next log entry; plain values."""
        return {
            "loss_sum": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "num_tokens": self._total_train_tokens,
        }

    def set_log_position(self, position: dict[str, Any]) -> None:
        """Go on summing where :meth:`log_position` was taken."""
        self._tr_loss.fill_(position["loss_sum"])
        self._globalstep_last_logged = int(position["last_logged_step"])
        self._metrics["train"].update(position["metrics"])
        self._total_train_tokens = position["num_tokens"]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # A callback's on_step_end would pause before this step is logged, leaving its log to the next round.
        is_boundary = self.state.global_step == self.boundary
        if is_boundary and self.args.logging_strategy == IntervalStrategy.EPOCH:
            # The epoch that ends here, and what is left of one at the end of the job, belong to this round.
            is_last = self.boundary + self.lead >= self.horizon
            self.control.should_log |= float(self.state.epoch).is_integer() or is_last
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if is_boundary:
            self.pause()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of a sharded model each process's part: transformers would write the first one's for all."""
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        torch.save(parts_of(self.optimizer), self._part_in(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_parts(
            self.optimizer, torch.load(self._part_in(checkpoint), map_location="cpu", weights_only=True)
        )
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _part_in(self, folder: str) -> Path:
        return Path(folder, f"optimizer_{self.args.process_index}.pt")

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Weights come from the federation; a state on disk has none."""


class RoundCallback(TrainerCallback):
    """Pauses before the first step, polls for an abort at every step, and passes logs on."""

    def __init__(
        self,
        on_begin: Callable[[], None],
        poll: Callable[[], None],
        on_logs: Callable[[dict[str, float]], None],
    ):
        self._on_begin = on_begin
        self._poll = poll
        self._on_logs = on_logs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pause: the first global weights are loaded here."""
        self._on_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if the task was aborted."""
        self._poll()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if the task was aborted."""
        self._poll()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if the task was aborted."""
        self._poll()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Pass one entry of the training's log on."""
        self._on_logs(logs or {})
