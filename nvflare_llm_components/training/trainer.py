"""TRL's trainer with a place to stop at each round boundary."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback
from trl import SFTTrainer


class Tally:
    """What one round has processed."""

    def __init__(self) -> None:
        self.num_examples = 0
        self.num_tokens = 0
        self.loss_sum: torch.Tensor | float = 0.0

    def add(self, inputs: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        """Count one micro-batch; ``loss`` is its share of the step's loss."""
        mask = inputs.get("attention_mask")
        ids = inputs["input_ids"]
        # Without a mask the rows are laid end to end, each beginning at position 0.
        self.num_examples += len(ids) if mask is not None else int((inputs["position_ids"] == 0).sum())
        self.num_tokens += int(mask.sum()) if mask is not None else ids.numel()
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
        pause: Called at the boundary.
        tally: Counts of the present round.
        proximal: FedProx's penalty in the present round, if the server asked for it.
    """

    boundary: int = 0
    horizon: int = 1
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

    def stretch_schedule(self, horizon: int) -> None:
        """Span the schedule over more steps than were planned, from the present step on."""
        self.horizon = horizon
        position = self.lr_scheduler.state_dict()
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

    def log_position(self) -> dict[str, float]:
        """What is summed up for the next log entry."""
        return {"loss_sum": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}

    def set_log_position(self, position: dict[str, float]) -> None:
        """Go on summing where :meth:`log_position` was taken."""
        self._tr_loss.fill_(position["loss_sum"])
        self._globalstep_last_logged = int(position["last_logged_step"])

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # A callback's on_step_end would pause before this step is logged, leaving its log to the next round.
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.state.global_step == self.boundary:
            self.pause()

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
