"""Variables that torch and glibc read when a process starts: set where the process is ours to start."""

import os
from collections.abc import MutableMapping

RECOMMENDED = {
    # Threads that spin while they wait take the cores from the other sites of a machine.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Large pages spare the kernel most of its work on fresh tensors.
    "THP_MEM_ALLOC_ENABLE": "1",
    # The same for FLARE's buffers, in two heaps: its hundreds of threads would spread them over eight a core.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2",
}
"""What README tells an administrator to export before a server or a site is started."""


def with_recommended(variables: MutableMapping[str, str]) -> dict[str, str]:
    """A process's environment with what it lacks of the recommended variables.

    >>> with_recommended({"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"]
    'ACTIVE'
    """
    return RECOMMENDED | dict(variables)


def recommend() -> None:
    """Set for this process and its children what the user has not: torch reads it when it is loaded."""
    os.environ.update(with_recommended(os.environ))
