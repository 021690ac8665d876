"""What a job may ask of the training, checked before anything is loaded."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

Settings = dict[str, Any]

# Argument of SFTConfig: why a job may not set it.
_REFUSED = {
    "output_dir": "the run directory of the job is used",
    "num_train_epochs": "set local_epochs on the executor",
    "max_steps": "set local_steps on the executor",
    "resume_from_checkpoint": "training state survives by itself, see checkpoint on the executor",
    "trust_remote_code": "a job may not bring code",
    "model_init_kwargs": "set model_kwargs on the executor",
    "push_to_hub": "a site's model leaves it by the federation only",
    "report_to": "curves go to TensorBoard and to the server",
    "load_best_model_at_end": "the server keeps the best global model",
    "auto_find_batch_size": "it would restart the training inside a round",
    "deepspeed": "one process trains on one device",
    "fsdp": "one process trains on one device",
}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The executor's arguments, with paths resolved. See :class:`HFSFTExecutor` for their meaning."""

    model_name_or_path: str
    train_data: Path
    eval_data: Path | None = None
    sft_config: Settings = field(default_factory=dict)
    peft_config: Settings | None = None
    model_kwargs: Settings = field(default_factory=dict)
    local_epochs: float | None = None
    local_steps: int | None = None
    params_type: str = "FULL"
    optimizer_state: str = "keep"
    checkpoint: str = "auto"
    keep_best_local: bool = False

    def checked(self) -> "TrainingSettings":
        """These settings with the default budget of one epoch filled in.

        Raises:
            ValueError: A setting has a value that cannot be used.
        """
        _check_choice("params_type", self.params_type, ("FULL", "DIFF"))
        _check_choice("optimizer_state", self.optimizer_state, ("keep", "reset"))
        _check_choice("checkpoint", self.checkpoint, ("auto", "always", "never"))
        if self.keep_best_local and self.eval_data is None:
            raise ValueError(
                "keep_best_local: expected eval_data, which says what is best, found none. Add it to the job."
            )
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError(
                "local_steps and local_epochs: expected one of them, found "
                f"{self.local_steps} and {self.local_epochs}. Remove one from the job."
            )
        if self.local_steps is not None:
            _check_positive("local_steps", self.local_steps, int)
            return self
        local_epochs = 1 if self.local_epochs is None else self.local_epochs
        _check_positive("local_epochs", local_epochs, float)
        return replace(self, local_epochs=local_epochs)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {value!r}.")


def _check_positive(name: str, value: Any, kind: type[int] | type[float]) -> None:
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or value <= 0:
        raise ValueError(f"{name}: expected a positive {kind.__name__}, found {value!r}.")


def given(name: str, value: str | None) -> str:
    """A path or name that a job must give; FLARE turns unset variables into None or leaves their braces.

    Raises:
        ValueError: ``value`` is not there.
    """
    if not isinstance(value, str) or not value or "{" in value or value.startswith("None/"):
        raise ValueError(
            f"{name}: expected a path or name, found {value!r}. A variable of the job is not set: define "
            f"it at "
            "the top of the JSON, or in the environment of this site."
        )
    return value


def build_sft_config(settings: Settings, output_dir: Path) -> SFTConfig:
    """A ``trl.SFTConfig`` from a job's ``sft_config``, on one device, logging to nobody.

    Raises:
        ValueError: ``sft_config`` sets what belongs to the executor, or what TRL does not know or accept.
    """
    for name in sorted(_REFUSED.keys() & settings.keys()):
        raise ValueError(f"sft_config: expected no '{name}', found {settings[name]!r}: {_REFUSED[name]}.")
    has_gpu = torch.cuda.is_available()
    chosen = {
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": has_gpu,
        **({} if has_gpu or settings.get("fp16") else {"bf16": False}),
        **settings,
    }
    try:
        config = SFTConfig(output_dir=str(output_dir), max_steps=_ENDLESS, **chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sft_config: trl.SFTConfig does not accept it: {error}") from error
    # Several visible devices would silently turn on DataParallel.
    config._n_gpu = min(config.n_gpu, 1)
    return config


# The executor, not the trainer, says when the last round is done.
_ENDLESS = 2**40
