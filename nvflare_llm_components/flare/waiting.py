"""Where results wait for the average: in files of the job's own run directory, by FLARE's disk offload.

FLARE writes what arrives below ``TMPDIR``, which is often memory, or small. It looks its folder up at each
message, so that another one can be named once it has set its own. In the simulator it sets it for the
server's line, but results arrive on the job's: both are set here.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nvflare.app_common.utils import tensor_disk_offload_context as offload
from nvflare.app_opt.pt.tensor_downloader import cleanup_active_disk_tensor_downloads
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.fqcn import FQCN

FOLDER = "waiting_results"
_IN_MEMORY = ("tmpfs", "ramfs")


def open_room(run_dir: Path, engine: Any, model: Mapping[str, Any], num_results: int) -> str:
    """Let results that arrive from now on wait in a folder of the run directory, emptied first.

    Args:
        run_dir: of the job, on the server.
        engine: FLARE's, whose cell receives the results; offload is on.
        model: tensors by name, what a result looks like.
        num_results: how many may wait at a time.

    Returns:
        A sentence where that is not so, or of no use: the disk has no room for them in float32, and they wait
        in memory; or its file system is kept in memory. Else empty.
    """
    cell = offload._get_cell(engine)
    if cell is None:
        return ""
    close_room(run_dir)
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)  # NFS keeps what is still mapped
    needed = 4 * num_results * sum(v.numel() for v in model.values() if isinstance(v, torch.Tensor))
    free = shutil.disk_usage(folder).free
    if free < needed:
        cell.update_fobs_context({offload._ENABLE_TENSOR_DISK_OFFLOAD: False})
        return (
            f"Results wait for the average in memory: {needed / 1e6:,.1f} MB may be needed in {folder}, "
            f"{free / 1e6:,.1f} MB are free."
        )
    for line in (cell, *_job_cells(run_dir)):
        line.update_fobs_context(
            {offload._ENABLE_TENSOR_DISK_OFFLOAD: True, offload._TENSOR_DISK_OFFLOAD_ROOT_DIR: str(folder)}
        )
    kept_in_memory = f"Results wait for the average in {folder}, whose file system is kept in memory."
    return kept_in_memory if is_in_memory(folder) else ""


def close_room(run_dir: Path) -> None:
    """Remove the folder and what is on its way there; what arrives later is kept in memory."""
    for line in _job_cells(run_dir):
        line.update_fobs_context({offload._ENABLE_TENSOR_DISK_OFFLOAD: False})
    cleanup_active_disk_tensor_downloads("its workflow has ended", str(run_dir / FOLDER))
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def _job_cells(run_dir: Path) -> list[CoreCell]:
    """FLARE's cell of the job on the server, in this process."""
    cell = CoreCell.ALL_CELLS.get(FQCN.join([FQCN.ROOT_SERVER, run_dir.name]))
    return [] if cell is None else [cell]


def is_in_memory(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether a folder's file system is kept in memory, as far as the system tells."""
    try:
        entries = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    path = folder.resolve()
    above = {Path(entry[1]): entry[2] for entry in entries if path.is_relative_to(entry[1])}
    return bool(above) and above[max(above, key=lambda mount: len(mount.parts))] in _IN_MEMORY
