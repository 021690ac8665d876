"""Two sites and a server in one process: real sessions, a plain average, the real persistor; no simulator."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable

from nvflare_llm_components.persistors import SafetensorsModelPersistor
from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.weights import StateDict
from tests.sites import Site
from tests.tiny import write_rows

NUM_ROUNDS = 2
SFT = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_length": 32, "use_cpu": True}


def open_site(folder: Path, model: Path, rows: str, peft_config: Any = None, **changes: Any) -> SFTSession:
    """A site with four rows of its own; a second one in the same folder is that site after a restart."""
    data: list[dict[str, object]] = [{"input": f"{rows} {n}", "output": str(n)} for n in range(4)]
    settings = {
        "model_name_or_path": str(model),
        "train_data": write_rows(folder / "rows.jsonl", data),
        "sft_config": SFT,
        "local_steps": 1,
        "checkpoint": "never",
        "peft_config": peft_config,
    }
    return SFTSession(TrainingSettings(**(settings | changes)), folder)


def train(session: SFTSession, global_model: StateDict, round_number: int) -> StateDict:
    """One round at a site: what it sends."""
    session.load(global_model)
    session.begin_round(round_number, NUM_ROUNDS, bool)
    report = session.train_round()
    sent = session.snapshot()
    session.keep(report, {}, session.present())
    session.settle()
    return sent


def average(results: list[StateDict]) -> StateDict:
    """Their mean in float32, in their dtypes; what is no float is the first's."""
    return {
        name: torch.stack([result[name].float() for result in results]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in results[0].items()
    }


@dataclass
class Server:
    """A persistor and its context.

    Attributes:
        weights: the global model.
        last: where it is saved.
    """

    persistor: SafetensorsModelPersistor
    fl_ctx: FLContext
    weights: StateDict
    last: Path

    @classmethod
    def start(cls, folder: Path, job_id: str = "job-1", **arguments: Any) -> "Server":
        """A server that has loaded what the job starts from."""
        persistor = SafetensorsModelPersistor(**arguments)
        site = Site(folder, "server", persistor, job_id=job_id)
        fl_ctx = site.new_context()
        fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, site.get_workspace(), private=True, sticky=True)
        weights = persistor.load(fl_ctx)[ModelLearnableKey.WEIGHTS]
        return cls(persistor, fl_ctx, weights, site.run_dir / "global_model/last")

    def save(self, weights: StateDict, round_number: int) -> None:
        """End a round with a new global model."""
        self.fl_ctx.set_prop("current_round", round_number, private=True, sticky=False)
        learnable = make_model_learnable(weights, {})
        self.persistor.save(learnable, self.fl_ctx)
        self.weights = learnable[ModelLearnableKey.WEIGHTS]
