"""What befalls a site or a server: it dies, hangs, is started again."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from tests.integration.deployment import Poc, wait_for


def processes_of(poc: Poc, name: str) -> list[psutil.Process]:
    """A site's or the server's processes, the job's included, and what starts them again."""
    found = []
    for pid in poc.processes(f"/prod_00/{name}"):
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def kill(poc: Poc, name: str) -> None:
    """All its processes at once, and what would start them again."""
    processes = processes_of(poc, name)
    assert processes
    for process in processes:
        process.suspend()  # else the site's parent process still tells how its job has died
    for process in processes:
        process.kill()
    wait_for(lambda: not poc.processes(f"/prod_00/{name}"))
    # start.sh takes any process, or thread, that has its daemon's old number by now for the daemon.
    (poc.kit(name) / "daemon_pid.fl").unlink(missing_ok=True)


def start(poc: Poc, site: str, variables: dict[str, str] | None = None) -> None:
    """Start a site that was killed, and wait until the server has it again."""
    before = poc.num_registered(site)
    poc.cli("poc", "start", "-p", site, "--no-wait", variables=variables)
    wait_for(lambda: poc.num_registered(site) > before)


@contextmanager
def suspended(poc: Poc, site: str) -> Iterator[None]:
    """Let a site hang: all its processes."""
    processes = processes_of(poc, site)
    assert processes
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        time.sleep(1)
