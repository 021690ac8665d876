"""A site's own best model: one file, replaced atomically."""

import math
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nvflare_llm_components.training.state import sync
from nvflare_llm_components.training.weights import StateDict

_LOSS = "eval_loss"


class BestModel:
    """The weights of the lowest loss offered so far, also by an earlier process."""

    def __init__(self, file: Path):
        self._file = file

    @property
    def loss(self) -> float:
        """Infinity if there is no best model yet."""
        if not self._file.exists():
            return math.inf
        with safe_open(self._file, framework="pt") as opened:
            return float(opened.metadata()[_LOSS])

    def offer(self, loss: float, values: StateDict) -> None:
        """Keep ``values`` if their loss is lower than any before."""
        if not loss < self.loss:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        writing = self._file.with_suffix(".writing")
        save_file(values, writing, metadata={_LOSS: repr(loss)})
        sync(writing)
        writing.replace(self._file)
        sync(self._file.parent)

    def read(self) -> StateDict | None:
        """The best weights, if there are any."""
        return load_file(self._file) if self._file.exists() else None
