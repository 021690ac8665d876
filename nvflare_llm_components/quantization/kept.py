"""Tensor files that a site keeps between rounds; a disk may have changed them since."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from nvflare_llm_components.quantization.wire import crc32_of
from nvflare_llm_components.tensors.safetensors_file import TensorFile


def open_kept(path: Path) -> TensorFile | None:
    """The file at `path`; None where there is none, or none that can be read."""
    try:
        return TensorFile.open_if_there(path)
    except (OSError, SafetensorError):
        return None


def checksum_of_file(file: TensorFile) -> str:
    """Checksum of all tensors in the order of their names."""
    crc32 = 0
    for name in file:
        crc32 = crc32_of(file.read(name), crc32)
    return f"{crc32:08x}"


class Checksum:
    """CRC-32 of the bytes of tensors that are on their way to a file."""

    def __init__(self) -> None:
        self._crc32 = 0

    def of(self, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The same blocks, each taken into account as it passes."""
        for block in blocks:
            self._crc32 = crc32_of(block, self._crc32)
            yield block

    @property
    def text(self) -> str:
        """Eight hex digits."""
        return f"{self._crc32:08x}"
