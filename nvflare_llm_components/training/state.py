"""Training state on disk: one complete copy, replaced atomically, for a process that is lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from nvflare_llm_components.training import randomness
from nvflare_llm_components.training.randomness import RandomState
from nvflare_llm_components.training.trainer import RoundTrainer
from nvflare_llm_components.training.weights import StateDict

FORMAT_VERSION = 1
_PROGRESS = "progress.json"
_WEIGHTS = "sent.safetensors"
_WRITING = "writing"


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
        writing, complete = self._folder / _WRITING, self._folder / f"step-{step}"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        fill(writing)
        for path in [*writing.iterdir(), writing]:
            sync(path)
        shutil.rmtree(complete, ignore_errors=True)
        writing.rename(complete)
        sync(self._folder)
        for path in self._folder.glob("step-*"):
            if path != complete:
                shutil.rmtree(path)

    def clear(self) -> None:
        """Remove all states."""
        shutil.rmtree(self._folder, ignore_errors=True)


def save_training(trainer: RoundTrainer, random_state: RandomState, folder: Path) -> None:
    """Write optimizer, schedule, random state and position, as ``resume_from_checkpoint`` reads them.

    Weights are not part of it: they come from the federation.
    """
    trainer._save_optimizer_and_scheduler(str(folder))
    trainer._save_scaler(str(folder))
    with randomness.preserved():
        randomness.restore(random_state)
        trainer._save_rng_state(str(folder))
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def save_progress(folder: Path, progress: dict[str, Any], sent: StateDict) -> None:
    """Write what the round was, and the weights that the site sent."""
    save_file(sent, folder / _WEIGHTS)
    text = json.dumps({"format_version": FORMAT_VERSION, **progress})
    (folder / _PROGRESS).write_text(text, encoding="utf-8")


def read_progress(folder: Path) -> dict[str, Any]:
    """What :func:`save_progress` wrote.

    Raises:
        ValueError: The state is of another version.
    """
    progress: dict[str, Any] = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    if progress.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"Training state '{folder}': expected format_version {FORMAT_VERSION}, found "
            f"{progress.get('format_version')}. Remove the folder to train without it."
        )
    return progress


def read_sent(folder: Path) -> StateDict:
    """The weights that the site sent at the end of the saved round."""
    return load_file(folder / _WEIGHTS)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
