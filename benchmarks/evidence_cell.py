"""One cell of the table of evidence: one model trained in one way, judged on every site's held-out rows."""

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.app_opt.pt.fedopt import PTFedOptModelShareableGenerator

from benchmarks.federated_cell import Federation, Scale, Way
from nvflare_llm_components.server_model import SafetensorsModule
from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.settings import TrainingSettings

SITES = ("dolly", "alpaca", "oasst1")
POOLED = "all"
LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
}
BATCH_SIZE = 2
LEARNING_RATE = 2e-3
FULL = Way("fp32", "fp32", "fp32")


@dataclass(frozen=True)
class Plan:
    """A row of the table.

    Attributes:
        name: of the row.
        trained_at: the sites that train, or `POOLED` for all their rows in one place; none for the base.
        way: how messages travel.
        optimizer: the server's, by its name in ``torch.optim``; None averages.
        optimizer_settings: its settings, as pairs.
    """

    name: str
    trained_at: tuple[str, ...]
    way: Way = FULL
    optimizer: str | None = None
    optimizer_settings: tuple[tuple[str, Any], ...] = ()


@dataclass
class Verdict:
    """What a cell gave: loss on each site's held-out rows, and bytes of the whole run."""

    losses: dict[str, float]
    bytes_down: int
    bytes_up: int
    seconds: float


def run_trial(plan: Plan, seed: int, scale: Scale, max_length: int, model: Path, data: Path) -> Verdict:
    """Train as planned, then judge the global model."""
    started = time.monotonic()
    # The same number of rows is seen, and of steps made, as by all sites together.
    steps = scale.local_steps * (len(SITES) if POOLED in plan.trained_at else 1)
    scale = replace(scale, local_steps=steps)
    with tempfile.TemporaryDirectory() as name:
        desk = _Desk(seed, scale, max_length, model, data, Path(name))
        trial = Trial(plan, desk, scale)
        try:
            if plan.trained_at:
                for number in range(scale.num_rounds):
                    trial.begin(number)
                    trial.train(number)
            losses = {site: desk.session(site).loss_of(trial.model) for site in SITES}
        finally:
            desk.close()
    seconds = time.monotonic() - started
    return Verdict(losses, trial.bytes_down, trial.bytes_up, seconds)


class _Judge(SFTSession):
    def loss_of(self, model: Mapping[str, torch.Tensor]) -> float:
        self.load(model)
        return self.evaluate(round_number=0)["eval_loss"]


class _Desk:
    """The sites' training sessions, each opened when it is first asked for."""

    def __init__(self, seed: int, scale: Scale, max_length: int, model: Path, data: Path, folder: Path):
        self.seed, self.scale, self.max_length = seed, scale, max_length
        self.model, self.data, self.folder = model, data, folder
        self._sessions: dict[str, _Judge] = {}

    def session(self, site: str) -> _Judge:
        if site not in self._sessions:
            (self.folder / site).mkdir()
            self._sessions[site] = _Judge(self._settings(site), self.folder / site)
        return self._sessions[site]

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()

    def _settings(self, site: str) -> TrainingSettings:
        return TrainingSettings(
            model_name_or_path=str(self.model),
            train_data=self.data / site / "training.jsonl",
            eval_data=self.data / site / "validation.jsonl",
            local_steps=self.scale.local_steps,
            checkpoint="never",
            peft_config=LORA,
            model_kwargs={"dtype": "bfloat16"},
            sft_config={
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": BATCH_SIZE,
                "per_device_eval_batch_size": BATCH_SIZE,
                "max_length": self.max_length,
                "gradient_checkpointing": False,
                "logging_steps": 1000,
                "seed": self.seed,
                "disable_tqdm": True,
            },
        )


class Trial(Federation):
    """A federation that starts from the server's own fresh adapter, and may step a server's optimizer."""

    def __init__(self, plan: Plan, desk: _Desk, scale: Scale) -> None:
        os.environ["NVFLARE_LLM_MODEL"] = str(desk.model)  # what this server lets jobs use
        server = SafetensorsModule(model_name_or_path=str(desk.model), peft_config=LORA, seed=desk.seed)
        server.handle_event(EventType.START_RUN, FLContext())
        first = {name: value.detach().clone() for name, value in server.named_parameters()}
        sessions = {site: desk.session(site) for site in plan.trained_at}
        super().__init__(sessions, first, plan.way, scale, desk.folder)
        self._stepping: PTFedOptModelShareableGenerator | None = None
        if plan.optimizer:
            self._stepping = PTFedOptModelShareableGenerator({"path": f"torch.optim.{plan.optimizer}"})
            self._stepping.model, self._stepping.device = server, torch.device("cpu")
            kind = getattr(torch.optim, plan.optimizer)
            self._stepping.optimizer = kind(server.parameters(), **dict(plan.optimizer_settings))

    def _take(self, mean: Mapping[str, torch.Tensor]) -> None:
        if self._stepping is None:
            super()._take(mean)
        else:
            weights, _ = self._stepping.server_update(mean)
            self.model = {name: value.detach().clone() for name, value in weights.items()}
