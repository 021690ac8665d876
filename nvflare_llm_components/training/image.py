"""A state dict in memory that other processes of this user can map: a safetensors file without a name."""

import os
from collections.abc import Iterable

import torch

from nvflare_llm_components.tensors.safetensors_file import Layout, tensor_file_header


class TensorImage:
    """Written once, tensor by tensor; gone when it is closed and nobody maps it any more.

    In a file system it would need room that containers do not have (/dev/shm), and a name that may clash.

    Args:
        layout: What will be written, in this order.
        values: Name and tensor, in the same order and dtypes; any device.
    """

    def __init__(self, layout: Layout, values: Iterable[tuple[str, torch.Tensor]]):
        self._descriptor = os.memfd_create("nvflare-llm-weights")
        try:
            with os.fdopen(self._descriptor, "wb", closefd=False) as file:
                file.write(tensor_file_header(layout, {"format": "pt"}))
                for _, value in values:
                    file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """Where another process opens it, while it is not closed."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Let go of it; mappings of it stay whole."""
        os.close(self._descriptor)
