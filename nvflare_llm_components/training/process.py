"""One rank's process on this machine: its place in the group, its start, and how it ended."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.training.channel import Channel, Message

_TAIL_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A rank's place; plain values.

    Attributes:
        number: Among all ranks of the site.
        num_processes: Of the site.
        local_number: Among those of its machine, which is the number of its GPU.
        num_local: Of its machine.
        interface: Network interface over which the ranks talk; empty for what the libraries find.
    """

    number: int
    num_processes: int
    local_number: int
    num_local: int
    interface: str


class RankProcess:
    """A rank that runs on this machine.

    Args:
        seat: Its place.
        logs: Folder for its log, and its working folder.
        theirs: The end of a channel that it serves.
    """

    def __init__(self, seat: Seat, logs: Path, theirs: Channel):
        self._log = logs / log_name(seat.number)
        descriptor = theirs.connection.fileno()
        command = [sys.executable, "-m", "nvflare_llm_components.training.rank", str(descriptor)]
        with self._log.open("ab") as log:
            # `-m` puts the working folder first in the path: one that only we write to.
            self._process = subprocess.Popen(
                command,
                cwd=logs,
                env=_environment(seat),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[descriptor],
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def kill(self) -> None:
        """Send it SIGKILL; :meth:`death` waits for its end."""
        self._process.kill()

    def death(self) -> Message:
        """Wait for its end: how it was, and the last that it wrote; so that it can forge no line of a log."""
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        tail = self._log.read_text(errors="replace")[-_TAIL_CHARACTERS:]
        last = "\n".join(map(printable, tail.splitlines()))
        return {"error": how, "traceback": last, "time": time.monotonic(), "is_dead": True}


def log_name(number: int) -> str:
    """The file with all that a rank writes."""
    return f"rank-{number}.log"


def devices_here(is_on_gpu: bool) -> int:
    """How many processes this machine has devices for: one a GPU, without GPUs one a core."""
    return torch.cuda.device_count() if is_on_gpu else len(os.sched_getaffinity(0))


def _environment(seat: Seat) -> dict[str, str]:
    """What accelerate looks for, and a fair share of the cores, unless the machine says otherwise."""
    share = max(len(os.sched_getaffinity(0)) // seat.num_local, 1)
    package = str(Path(__file__).parents[2])
    between = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if seat.interface else ()
    return {
        "OMP_NUM_THREADS": str(share),
        **dict.fromkeys(between, seat.interface),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "RANK": str(seat.number),
        "LOCAL_RANK": str(seat.local_number),
        "WORLD_SIZE": str(seat.num_processes),
        "LOCAL_WORLD_SIZE": str(seat.num_local),
    }
