"""Tensors on their way to the server from a site that dies: its result is lost, and no job with it.

FLARE's server pulls a result's tensors from the site while it decodes the message, and ends the job's process
where that fails: when the site's machine has died, or as soon as the job's own end cuts the pull short.
"""

import logging
from typing import Any

import torch
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.utils import fobs

from nvflare_llm_components.flare.slices import SLICE_BYTES, SlicedTensors, fetch_tensors
from nvflare_llm_components.tensors.text import printable

logger = logging.getLogger(__name__)


class Lost(dict[str, torch.Tensor]):
    """In the place of tensors that did not arrive: an empty one under each name, which fits no parameter."""

    def __contains__(self, name: object) -> bool:
        return True

    def get(self, name: str, default: Any = None) -> torch.Tensor:
        """An empty tensor."""
        return torch.empty(0)


class ArrivingTensors(TensorDecomposer):
    """FLARE's own way of tensors, but where a site's do not reach the server's job, its result is refused.

    What checks a result finds empty tensors, refuses it by the first one's name, and the round goes on.
    """

    def to_downloadable(
        self, items: dict[str, torch.Tensor], max_chunk_size: int, fobs_ctx: dict[str, Any]
    ) -> SlicedTensors:
        """See FLARE's TensorDecomposer."""
        is_default = max_chunk_size == self.max_chunk_size
        return SlicedTensors(items, max_chunk_size, SLICE_BYTES if is_default else max_chunk_size)

    def download(self, from_fqcn: str, ref_id: str, **options: Any) -> tuple[str, Any]:
        """See FLARE's TensorDecomposer."""
        try:
            error, items = super().download(from_fqcn=from_fqcn, ref_id=ref_id, **options)
        except Exception as caught:
            if not _is_server_job(options["cell"].get_fqcn()):
                raise
            error, items = str(caught) or type(caught).__name__, None
        if not error or not _is_server_job(options["cell"].get_fqcn()):
            return error, items
        site = printable(from_fqcn.partition(".")[0])
        logger.warning("A result of '%s' did not arrive whole and does not count: %s", site, printable(error))
        return "", Lost()

    @staticmethod
    def _download(cell: Any, use_disk: bool, root_dir: str | None = None, **options: Any) -> tuple[Any, Any]:
        return fetch_tensors(cell, root_dir if use_disk else None, **options)


def register_tensors() -> None:
    """Let FLARE send and receive tensors; the first call in a process decides how."""
    fobs.register(ArrivingTensors)


def _is_server_job(fqcn: str) -> bool:
    path = FQCN.split(fqcn)
    return len(path) > 1 and path[0] == FQCN.ROOT_SERVER
