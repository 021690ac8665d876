"""A site's curves: one JSON line an event, TensorBoard, and whoever else listens."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

Listener = Callable[[str, float, int], None]
"""Called with tag, value and optimizer step."""

_TAGS = {
    ("train", "loss"): "train/loss",
    ("train", "learning_rate"): "train/learning_rate",
    ("train", "grad_norm"): "train/grad_norm",
    ("train", "entropy"): "train/entropy",
    ("train", "mean_token_accuracy"): "train/mean_token_accuracy",
    ("eval", "eval_loss"): "eval/loss",
    ("eval", "eval_perplexity"): "eval/perplexity",
    ("eval", "eval_mean_token_accuracy"): "eval/mean_token_accuracy",
    ("local_eval", "eval_loss"): "local_eval/loss",
    ("round", "train_loss"): "round/train_loss",
}


_KEPT = ("grad_norm", "entropy", "mean_token_accuracy", "aux_loss")
"""What TRL logs beside loss and learning rate."""


def kept_of(logs: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """What is worth a curve in an entry of TRL's log, whose names begin with ``prefix``."""
    return {prefix + name: float(logs[prefix + name]) for name in _KEPT if prefix + name in logs}


class MetricsLog:
    """Appends to ``metrics.jsonl`` and writes TensorBoard events in ``tb_events`` of one folder."""

    def __init__(self, folder: Path, listener: Listener | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._board = SummaryWriter(str(folder / "tb_events"))
        self._listener = listener

    def write(self, kind: str, **values: Any) -> None:
        """Add one line, and its curves; ``kind`` is ``train``, ``eval``, ``local_eval`` or ``round``."""
        step = values.get("step", values.get("end_step", 0))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values, "time": time.time()}) + "\n")
        for name, value in values.items():
            tag = _TAGS.get((kind, name))
            if tag and isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(tag, value, step)
                if self._listener:
                    self._listener(tag, value, step)
        self._board.flush()

    def close(self) -> None:
        """Close the TensorBoard file."""
        self._board.close()


def perplexity(loss: float) -> float:
    """``exp(loss)``, kept finite."""
    return math.exp(min(loss, 700.0))
