"""One cell of the convergence table: a federation in one process, of the package's own parts.

Training sessions, codecs, error feedback, shadows and FLARE's aggregation helper are the real ones; only
tasks and transport are left out, so that a cell takes seconds.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

from benchmarks.trials import SPARSE, TRIALS
from nvflare_llm_components.quantization.feedback import encode_with_feedback, open_residual
from nvflare_llm_components.quantization.message import decode_message, encode_message
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.quantization.shadow import advance, follow, held_shadow
from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.weights import difference

LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
}
LEARNING_RATES = {"sft": 1e-3, "lora": 3e-3}


@dataclass(frozen=True)
class Way:
    """How messages travel.

    Attributes:
        name: of the line in the table.
        down: precision of broadcasts.
        up: precision of results, or the name of a trial that is no precision of the package.
        params_type: results are whole weights (``FULL``) or updates (``DIFF``).
        error_feedback: whether updates carry what rounding left out of the last one.
        proximal_mu: FedProx's coefficient; 0 for none.
        momentum: of a site's updates, for trials only.
        server_rate: what the server multiplies the mean update with.
    """

    name: str
    down: str
    up: str
    params_type: str = "FULL"
    error_feedback: bool = False
    proximal_mu: float = 0.0
    momentum: float = 0.0
    server_rate: float = 1.0


@dataclass(frozen=True)
class Scale:
    """How much is trained."""

    num_rounds: int
    local_steps: int


@dataclass
class Outcome:
    """What a cell gave: mean eval loss of the global model before each round and at the end; bytes."""

    eval_losses: list[float]
    bytes_down: int
    bytes_up: int
    seconds: float


def run_cell(
    mode: str,
    way: Way,
    seed: int,
    scale: Scale,
    model: Path,
    data: Path,
    sites: list[str],
    rates: Mapping[str, float],
) -> Outcome:
    """Run one federation to its end, with the learning rate of its mode."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sessions = {}
        for site in sites:
            (folder / site).mkdir()
            sessions[site] = SFTSession(
                _settings(mode, rates[mode], seed, scale, model, data / site), folder / site
            )
        first = {name: value.float() for name, value in next(iter(sessions.values())).snapshot().items()}
        federation = Federation(sessions, first, way, scale, folder)
        try:
            outcome = federation.run()
        finally:
            federation.close()
    outcome.seconds = time.monotonic() - started
    return outcome


class Federation:
    """A server and its sites.

    Args:
        sessions: of the sites that train.
        model: the first global model.
        way: how messages travel.
        scale: how much is trained.
        folder: with a folder for each site, where shadows and residuals are kept.
    """

    def __init__(
        self,
        sessions: Mapping[str, SFTSession],
        model: Mapping[str, torch.Tensor],
        way: Way,
        scale: Scale,
        folder: Path,
    ) -> None:
        self.sessions, self.model = sessions, dict(model)
        self.way, self.scale, self.folder = way, scale, folder
        self.residuals: dict[str, dict[str, torch.Tensor]] = {site: {} for site in sessions}
        self.velocities: dict[str, dict[str, torch.Tensor]] = {site: {} for site in sessions}
        self.bytes_down = self.bytes_up = 0

    def run(self) -> Outcome:
        """All rounds, with an evaluation before each and after the last."""
        losses = []
        for number in range(self.scale.num_rounds):
            self.begin(number)
            losses.append(self._mean_loss(number))
            self.train(number)
        losses.append(self._mean_loss(self.scale.num_rounds))
        return Outcome(losses, self.bytes_down, self.bytes_up, 0.0)

    def close(self) -> None:
        """End the training threads."""
        for session in self.sessions.values():
            session.close()

    def begin(self, number: int) -> None:
        """Park all sites at the start of a round."""
        for session in self.sessions.values():
            session.begin_round(number, self.scale.num_rounds, bool)

    def train(self, number: int) -> None:
        """One round: broadcast, training, results, average."""
        broadcast, helper = self._broadcast(), WeightedAggregationHelper()
        for site, session in self.sessions.items():
            received = self._receive(broadcast, self.folder / site)
            session.load(received)
            report = session.train_round(self.way.proximal_mu)
            values = self._sent(site, session.snapshot(), received, number)
            helper.add(values, report.num_examples, site, number)
        self._take(helper.get_result())

    def _broadcast(self) -> Any:
        policy = PrecisionPolicy(self.way.down)
        if policy.has_differences:
            return advance(self.model, policy, self.folder / "server")
        return encode_message(self.model, policy)

    def _receive(self, broadcast: Any, folder: Path) -> Mapping[str, Any]:
        message = broadcast.message_for(held_shadow(folder))
        self.bytes_down += message.traffic.bytes_after
        if "shadow" in message.header:
            return follow(message.values, message.header, folder, None, lazy=False)[0]
        return decode_message(message.values, message.header, None, lazy=False)[0]

    def _sent(
        self, site: str, new: dict[str, torch.Tensor], received: Mapping[str, Any], number: int
    ) -> Mapping[str, Any]:
        """What the server has of a site's result."""
        values = new if self.way.params_type == "FULL" else difference(new, received)
        if self.way.up in TRIALS:
            return self._tried(values, self.residuals[site], self.velocities[site])
        policy, folder = PrecisionPolicy(self.way.up), self.folder / site
        if self.way.error_feedback:
            residual = open_residual(folder, number - 1)
            message = encode_with_feedback(values, policy, folder, number, residual)
        else:
            message = encode_message(values, policy)
        self.bytes_up += message.traffic.bytes_after
        return decode_message(message.values, message.header, None, lazy=True)[0]

    def _tried(
        self,
        values: Mapping[str, torch.Tensor],
        residual: dict[str, torch.Tensor],
        velocity: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """What arrives by a code of a trial, with error feedback.

        Formula of momentum: Lin et al., Deep Gradient Compression, https://arxiv.org/abs/1712.01887, with its
        momentum factor masking where only some values are sent.
        """
        sent = {}
        for name, value in values.items():
            velocity[name] = value.float() + self.way.momentum * velocity.get(name, 0.0)
            whole = velocity[name] + residual.get(name, 0.0)
            sent[name], num_bytes = TRIALS[self.way.up](whole)
            residual[name] = whole - sent[name]
            if self.way.up in SPARSE:
                velocity[name] = velocity[name].where(sent[name] == 0, 0.0)
            self.bytes_up += num_bytes
        return sent

    def _take(self, mean: Mapping[str, torch.Tensor]) -> None:
        if self.way.params_type == "FULL":
            self.model = dict(mean)
        else:
            self.model = {
                name: value + self.way.server_rate * mean[name] for name, value in self.model.items()
            }

    def _mean_loss(self, number: int) -> float:
        losses = []
        for session in self.sessions.values():
            session.load(self.model)
            losses.append(session.evaluate(round_number=number)["eval_loss"])
        return sum(losses) / len(losses)


def _settings(mode: str, rate: float, seed: int, scale: Scale, model: Path, data: Path) -> TrainingSettings:
    return TrainingSettings(
        model_name_or_path=str(model),
        train_data=data / "training.jsonl",
        eval_data=data / "validation.jsonl",
        local_steps=scale.local_steps,
        checkpoint="never",
        peft_config=LORA if mode == "lora" else None,
        sft_config={
            "learning_rate": rate,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 8,
            "max_length": 96,
            "logging_steps": 1000,
            "seed": seed,
            "disable_tqdm": True,
        },
    )
