"""The executor's arguments as one object, and the ``SFTConfig`` made of them; ranges: the gate."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed
from trl import SFTConfig

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.training.row_files import RowLimits

Settings = dict[str, Any]


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
    trainable: list[str] | None = None
    schedule: str = "federation"
    row_limits: RowLimits = field(default_factory=RowLimits)
    num_processes: int | Literal["auto"] = 1
    sharding: str = "none"
    offload: str = "none"

    @property
    def is_on_gpu(self) -> bool:
        """Whether the training runs on GPUs: where there are any, unless ``use_cpu`` is set."""
        return torch.cuda.is_available() and not self.sft_config.get("use_cpu")

    @property
    def is_sharded(self) -> bool:
        """Whether each of several processes holds a part of the model."""
        return self.sharding == "full" and self.num_processes != 1

    @property
    def is_offloaded(self) -> bool:
        """Whether the parts stay in the machine's memory; where there are no GPUs they are there anyway."""
        return self.offload == "cpu" and self.is_sharded and self.is_on_gpu

    def to_json(self) -> Settings:
        """These settings as plain values, for a process with another working folder."""
        paths = {"train_data": str(self.train_data.resolve())}
        paths["eval_data"] = str(self.eval_data.resolve()) if self.eval_data else ""
        if Path(self.model_name_or_path).is_dir():
            paths["model_name_or_path"] = str(Path(self.model_name_or_path).resolve())
        return {**asdict(self), **paths}

    @classmethod
    def from_json(cls, values: Settings) -> "TrainingSettings":
        """The settings that :meth:`to_json` gave."""
        changed = {
            "train_data": Path(values["train_data"]),
            "eval_data": Path(values["eval_data"]) if values["eval_data"] else None,
            "row_limits": RowLimits(**values["row_limits"]),
        }
        return cls(**{**values, **changed})

    def checked(self) -> "TrainingSettings":
        """These settings with the default budget of one epoch filled in.

        Raises:
            ValueError: A setting has a value that cannot be used.
        """
        _check_choice("params_type", self.params_type, ("FULL", "DIFF"))
        _check_choice("optimizer_state", self.optimizer_state, ("keep", "reset"))
        _check_choice("checkpoint", self.checkpoint, ("auto", "always", "never"))
        _check_choice("schedule", self.schedule, ("federation", "site"))
        _check_choice("sharding", self.sharding, ("none", "full"))
        _check_choice("offload", self.offload, ("none", "cpu"))
        if self.offload == "cpu" and not self.is_sharded:
            raise ReportableError(
                "offload: expected sharding 'full' and several processes, whose parts 'cpu' keeps in the "
                f"machine's memory, found sharding {self.sharding!r} and num_processes {self.num_processes}. "
                "Change the job."
            )
        if self.num_processes != "auto":
            _check_positive("num_processes", self.num_processes, int)
        if self.keep_best_local and self.eval_data is None:
            raise ReportableError(
                "keep_best_local: expected eval_data, which says what is best, found none. Add it to the job."
            )
        if self.local_steps is not None and self.local_epochs is not None:
            raise ReportableError(
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
        raise ReportableError(f"{name}: expected one of {', '.join(choices)}, found {value!r}.")


def _check_positive(name: str, value: Any, kind: type[int] | type[float]) -> None:
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or value <= 0:
        raise ReportableError(f"{name}: expected a positive {kind.__name__}, found {value!r}.")


def given(name: str, value: str | None) -> str:
    """A path or name that a job must give; FLARE turns unset variables into None or leaves their braces.

    Raises:
        ValueError: ``value`` is not there.
    """
    if not isinstance(value, str) or not value or "{" in value or value.startswith("None/"):
        raise ReportableError(
            f"{name}: expected a path or name, found {value!r}. A variable of the job is not set: define it "
            "at the top of the JSON, or in the environment of this site."
        )
    return value


def build_sft_config(settings: Settings, output_dir: Path) -> SFTConfig:
    """A ``trl.SFTConfig`` from a job's ``sft_config``, on one device, logging to nobody.

    Raises:
        ValueError: TRL does not know or accept it.
    """
    has_gpu = torch.cuda.is_available()
    # Without it accelerate forms no group of processes on a CPU: each would train for itself.
    is_cpu_group = distributed.is_initialized() and distributed.get_backend() == "gloo"
    chosen = {
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "trust_remote_code": False,
        "dataloader_pin_memory": has_gpu,
        **({} if has_gpu or settings.get("fp16") else {"bf16": False}),
        **({"use_cpu": True} if is_cpu_group else {}),
        **settings,
    }
    try:
        config = SFTConfig(output_dir=str(output_dir), max_steps=_ENDLESS, **chosen)
    except (TypeError, ValueError) as error:
        raise ReportableError(f"sft_config: trl.SFTConfig does not accept it: {error}") from error
    # Several visible devices would silently turn on DataParallel.
    config._n_gpu = min(config.n_gpu, 1)
    return config


# The executor, not the trainer, says when the last round is done.
_ENDLESS = 2**40
