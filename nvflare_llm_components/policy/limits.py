"""What a job may take of a machine: its model's memory, processes, and disk that must stay free."""

import shutil
from pathlib import Path

from nvflare_llm_components.policy.site import Limits, beyond

_GIB = 2**30


def check_model_bytes(num_bytes: int, limits: Limits) -> None:
    """Check the size of a model before it is loaded.

    Args:
        num_bytes: of its weights, in the dtype that they will have.
        limits: this machine's.

    Raises:
        PolicyError: it is larger than a model may be here.
    """
    if limits.model_gib is not None and num_bytes > limits.model_gib * _GIB:
        raise beyond(
            "model_name_or_path",
            f"weights of at most {limits.model_gib:g} GiB once loaded",
            f"{num_bytes / _GIB:.3g} GiB",
            "limits.model_gib",
        )


def check_free_disk(folder: Path, limits: Limits) -> None:
    """Check that a disk has the room that a job must leave on it, before more is written.

    Args:
        folder: that is written to; it may be missing.
        limits: this machine's.

    Raises:
        PolicyError: less is free.
    """
    if limits.free_disk_gib is None:
        return
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < limits.free_disk_gib * _GIB:
        raise beyond(
            "disk of the run directory",
            f"at least {limits.free_disk_gib:g} GiB free",
            f"{free / _GIB:.3g} GiB",
            "limits.free_disk_gib",
        )


def check_processes(asked: object, limits: Limits) -> None:
    """Check a job's ``num_processes``; "auto" is held to the ceiling by :func:`held_processes`.

    Raises:
        PolicyError: it asks for more than a job may have here.
    """
    ceiling = limits.processes
    if ceiling is not None and isinstance(asked, int) and asked > ceiling:
        raise beyond("num_processes", f"at most {ceiling}", asked, "limits.processes")


def held_processes(found: int, limits: Limits) -> int:
    """How many processes train, of those that this machine has devices for."""
    return found if limits.processes is None else min(found, limits.processes)
