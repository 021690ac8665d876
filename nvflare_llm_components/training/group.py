"""The ranks of a site, started: on this machine, and where it has too few devices on the site's nodes."""

import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import distributed

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.training.channel import Channel, ChannelClosedError, Message
from nvflare_llm_components.training.nodes import Node, RemoteRank, interface_of, nodes_of_site
from nvflare_llm_components.training.process import RankProcess, Seat, devices_here
from nvflare_llm_components.training.settings import TrainingSettings


class LocalRank:
    """A rank on this machine, as its parent sees it.

    Args:
        seat: Its place.
        logs: Folder for its log.
    """

    def __init__(self, seat: Seat, logs: Path):
        self.number = seat.number
        self.channel, theirs = Channel.pair()
        try:
            self.process = RankProcess(seat, logs, theirs)
        finally:
            theirs.close()

    def kill(self) -> None:
        """Let the system end it."""
        self.process.kill()
        self.channel.close()

    def wait(self) -> None:
        """Return when it has ended."""
        self.process.death()

    def receive(self) -> Message:
        """Its next message, or its end."""
        try:
            return self.channel.receive()
        except ChannelClosedError:
            return self.process.death()


class Group:
    """All ranks of a site, and where they meet.

    Args:
        num_processes: Of the site.
        is_on_gpu: Whether each has a GPU.
        logs: The folder of their logs.

    Attributes:
        ranks: In order; those of this machine first.
        rendezvous: A file that only this user can open, or an address of this machine.

    Raises:
        ReportableError: The site has too few devices, or a node can't be used.
    """

    def __init__(self, num_processes: int, is_on_gpu: bool, logs: Path):
        self.ranks: list[LocalRank | RemoteRank] = []
        self._store: Any = None
        devices = [devices_here(is_on_gpu)]
        nodes = nodes_of_site() if num_processes > devices[0] else []
        devices += [node.devices(is_on_gpu) for node in nodes]
        self._meeting = Path(tempfile.mkdtemp(prefix=".nvflare-llm-", dir=logs if nodes else None))
        try:
            here = _address_towards(nodes[0]) if nodes else ""
            self.rendezvous = self._listen(here) if nodes else str(self._meeting / "rendezvous")
            for machine, seat in seats(num_processes, devices, interface_of(here) if nodes else "lo"):
                self.ranks.append(
                    RemoteRank(nodes[machine - 1], seat, logs, self._meeting)
                    if machine
                    else LocalRank(seat, logs)
                )
        except BaseException:
            self.close()
            raise

    @property
    def spans_nodes(self) -> bool:
        """Whether some ranks can't map an image in this machine's memory."""
        return self._store is not None

    def close(self) -> None:
        """Kill the ranks. May be called twice."""
        ranks, self.ranks = self.ranks, []
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            if isinstance(rank, LocalRank):
                rank.wait()
        self._store = None
        shutil.rmtree(self._meeting, ignore_errors=True)

    def _listen(self, address: str) -> str:
        """Let the ranks find each other at a port of one address of this machine."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family)
        port = int(listener.getsockname()[1])
        self._store = distributed.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return f"{address} {port}"


def seats(num_processes: int, devices: Sequence[int], interface: str) -> Iterator[tuple[int, Seat]]:
    """Each rank's machine and seat: a machine is filled before the next one is used; 0 is this one.

    Raises:
        ReportableError: The machines have too few devices.
    """
    if sum(devices) < num_processes:
        raise ReportableError(
            f"num_processes: expected devices for {num_processes} on all machines of this site, found "
            f"{sum(devices)}. Set it to what the site has."
        )
    start = 0
    for machine, found in enumerate(devices):
        num_local = min(found, num_processes - start)
        for local in range(num_local):
            yield (
                machine,
                Seat(
                    number=start + local,
                    num_processes=num_processes,
                    local_number=local,
                    num_local=num_local,
                    interface=interface,
                ),
            )
        start += num_local


def processes_for(settings: TrainingSettings) -> int:
    """How many processes a job's ``num_processes`` means at this site.

    Raises:
        ReportableError: It has fewer devices.
    """
    asked = settings.num_processes
    if asked == 1 or (asked == "auto" and not settings.is_on_gpu):
        return 1
    found = devices_here(settings.is_on_gpu)
    if asked == "auto" or asked > found:
        found += sum(node.devices(settings.is_on_gpu) for node in nodes_of_site())
    if asked == "auto":
        return found
    if asked > found:
        kind = "GPUs" if settings.is_on_gpu else "cores"
        raise ReportableError(
            f"num_processes: expected {asked} {kind}, found {found}. Set num_processes to what every site "
            "has, or to 'auto'."
        )
    return asked


def _address_towards(node: Node) -> str:
    """This machine's address, as a node sees it."""
    channel, address = node.connect()
    with suppress(OSError):
        channel.close()
    return address
