"""What a run starts from on a server, as its policy accepts it: for the persistor and the server's module."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext

from nvflare_llm_components.checkpoint.global_models import resumed_model
from nvflare_llm_components.checkpoint.initial_model import InitialModel, load_initial_model
from nvflare_llm_components.flare.site import (
    accepted_adapter,
    accepted_folder,
    accepted_run,
    accepted_size,
    accepted_start,
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a job says of its first model; see `SafetensorsModelPersistor` for the arguments."""

    model_name_or_path: str | None
    peft_config: dict[str, Any] | None
    seed: int
    resume_from: str | None
    trainable: list[str] | None

    @classmethod
    def of(cls, component: object) -> "Start":
        """What a component was given, which keeps its arguments under these names."""
        return cls(**{argument.name: getattr(component, argument.name) for argument in fields(cls)})

    def accepted(self, fl_ctx: FLContext) -> Callable[[], InitialModel]:
        """What reads the model: the one named, or the one that an earlier run has come to.

        Raises:
            CheckpointError: if the earlier run left no model.
            PolicyError: if this kit's policy refuses the model or adapter; audited. What is returned raises
                it, too, where the model is larger than this machine takes: before an adapter is made.
        """
        accepted_adapter(fl_ctx, self.peft_config)
        if self.resume_from is None:
            place = accepted_start(fl_ctx, self.model_name_or_path)
        else:
            place = str(resumed_folder(fl_ctx, str(self.resume_from)))
        allow = partial(accepted_size, fl_ctx)
        return partial(load_initial_model, place, self.peft_config, self.seed, self.trainable, allow)


def resumed_folder(fl_ctx: FLContext, resume_from: str) -> Path:
    """The folder of the last model of an earlier run.

    Raises:
        CheckpointError: if it left none.
        PolicyError: if this kit's policy refuses it; audited.
    """
    run = accepted_run(fl_ctx, "resume_from", resume_from, may_be_brought=True)
    return accepted_folder(fl_ctx, resumed_model(str(run)))
