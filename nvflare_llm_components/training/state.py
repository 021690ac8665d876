"""Training state on disk: one complete copy, replaced atomically, for a process that is lost."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare_llm_components.tensors.atomic import replace_folder
from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.safetensors_file import map_tensor_file, write_tensor_file
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.training import randomness
from nvflare_llm_components.training.randomness import RandomState
from nvflare_llm_components.training.rounds import RoundCount
from nvflare_llm_components.training.trainer import RoundTrainer
from nvflare_llm_components.training.weights import Readable, StateDict

logger = logging.getLogger(__name__)
FORMAT_VERSION = 2
_PROGRESS = "progress.json"
_WEIGHTS = "sent.safetensors"


class StateFolder:
    """Holds at most one complete state; the previous one stays until the next is complete."""

    def __init__(self, folder: Path):
        self._folder = folder

    def latest(self) -> Path | None:
        """The newest complete state, if there is one."""
        found = sorted(self._folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
        return found[-1] if found else None

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Let ``fill`` write a state of optimizer step ``step``; it counts only once it is whole on disk."""
        complete = self._folder / f"step-{step}"
        replace_folder(complete, fill)
        for path in self._folder.glob("step-*"):
            if path != complete:
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove all states."""
        shutil.rmtree(self._folder, ignore_errors=True)


def save_training(trainer: RoundTrainer, random_state: RandomState, folder: Path) -> None:
    """Write optimizer, schedule, random state and position, as ``resume_from_checkpoint`` reads them.

    Weights are not part of it: they come from the federation. Of several processes each calls this, and
    writes what is its own; the first writes what all have in common.
    """
    trainer._save_optimizer_and_scheduler(str(folder))
    trainer._save_scaler(str(folder))
    with randomness.preserved():
        randomness.restore(random_state)
        trainer._save_rng_state(str(folder))
    if trainer.args.should_save:
        trainer.state.save_to_json(str(folder / "trainer_state.json"))


def save_progress(folder: Path, progress: dict[str, Any], sent: Readable) -> None:
    """Write what the round was, and the weights that the site sent."""
    write_tensor_file(folder / _WEIGHTS, sent)
    text = json.dumps({"format_version": FORMAT_VERSION, **progress})
    (folder / _PROGRESS).write_text(text, encoding="utf-8")


def read_progress(folder: Path) -> dict[str, Any]:
    """What :func:`save_progress` wrote, with its ``rounds`` as a `RoundCount`; empty if it is damaged.

    Raises:
        ValueError: The state is of another version.
    """
    try:
        progress: dict[str, Any] = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        version, rounds = progress["format_version"], progress["rounds"]
        if version == FORMAT_VERSION:
            progress["rounds"] = RoundCount.read(rounds)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("Training state '%s' is damaged (%s): it is left.", folder, type(error).__name__)
        return {}
    if version != FORMAT_VERSION:
        raise ReportableError(
            f"Training state '{folder}': expected format_version {FORMAT_VERSION}, found "
            f"{printable(repr(version), 60)}. Remove the folder to train without it."
        )
    return progress


def read_sent(folder: Path) -> StateDict:
    """The weights that the site sent at the end of the saved round."""
    return map_tensor_file(folder / _WEIGHTS)
