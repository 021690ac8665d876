"""Tensor files that a site keeps between rounds; a disk may have changed them since."""

from pathlib import Path

from safetensors import SafetensorError

from nvflare_llm_components.quantization.wire import crc32_of
from nvflare_llm_components.tensors.safetensors_file import TensorFile


def open_kept(path: Path) -> TensorFile | None:
    """The file at `path`; None where there is none, or none that can be read."""
    try:
        return TensorFile.open_if_there(path)
    except (OSError, SafetensorError):
        return None


def crc32_of_file(file: TensorFile) -> int:
    """CRC-32 of the bytes of all tensors in the order of their names."""
    crc32 = 0
    for name in file:
        crc32 = crc32_of(file.read(name), crc32)
    return crc32
