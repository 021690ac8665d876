"""A site's own best model: one file, replaced atomically."""

import math
from pathlib import Path

from nvflare_llm_components.tensors.safetensors_file import TensorFile, map_tensor_file, write_tensor_file
from nvflare_llm_components.training.weights import Readable, StateDict

_LOSS = "eval_loss"


class BestModel:
    """The weights of the lowest loss offered so far, also by an earlier process."""

    def __init__(self, file: Path):
        self._file = file

    @property
    def loss(self) -> float:
        """Infinity if there is no best model yet."""
        file = TensorFile.open_if_there(self._file)
        return math.inf if file is None else float(file.metadata[_LOSS])

    def offer(self, loss: float, values: Readable) -> None:
        """Keep ``values`` if their loss is lower than any before."""
        if loss < self.loss:
            write_tensor_file(self._file, values, metadata={_LOSS: repr(loss)})

    def read(self) -> StateDict | None:
        """The best weights, if there are any."""
        return map_tensor_file(self._file) if self._file.exists() else None
