"""Further machines of a site, as its front end sees them: the site's environment names them, no job can."""

import importlib.metadata
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.training.channel import Channel, ChannelClosedError, Message
from nvflare_llm_components.training.process import Seat
from nvflare_llm_components.training.secret import VARIABLE, StrangerError, introduce, read_secret

NODES = "NVFLARE_LLM_NODES"
_CONNECT_S = 5.0
_PACKAGES = ("nvflare-llm-components", "torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class Node:
    """A machine on which ``nvflare-llm node`` runs.

    Attributes:
        number: Its place in the list, from 1; what is told of it leaves the site, its address does not.
        host: Its name or address.
        port: Where it listens.
        secret: What it and this site share.
    """

    number: int
    host: str
    port: int
    secret: bytes

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"node {self.number} of {NODES}"

    def devices(self, is_on_gpu: bool) -> int:
        """How many processes it has devices for.

        Raises:
            ReportableError: It can't be reached, does not know the secret, or has other packages.
        """
        channel, _ = self.connect()
        try:
            channel.send(name="about", is_on_gpu=is_on_gpu)
            about = channel.receive()
        except ChannelClosedError as error:
            raise self._lost() from error
        finally:
            channel.close()
        self._check_packages(about["packages"])
        return int(about["devices"])

    def connect(self) -> tuple[Channel, str]:
        """A channel to it, and the address of this machine that it sees.

        Raises:
            ReportableError: It can't be reached, or does not know the secret.
        """
        try:
            connection = socket.create_connection((self.host, self.port), _CONNECT_S)
        except OSError as error:
            raise self._lost() from error
        try:
            introduce(connection, self.secret)
        except StrangerError as error:
            connection.close()
            raise ReportableError(
                f"{self.name}: expected it to share this site's secret, found that it doesn't, or that it is "
                f"busy. Give both machines the same {VARIABLE}."
            ) from error
        address = str(connection.getsockname()[0])
        return Channel.of_socket(connection), address

    def _lost(self) -> ReportableError:
        return ReportableError(
            f"{self.name}: expected `nvflare-llm node` to answer there, found that it doesn't. Start it, or "
            "take the node out of the list."
        )

    def _check_packages(self, found: dict[str, str]) -> None:
        for name, version in packages().items():
            if found.get(name) != version:
                raise ReportableError(
                    f"{self.name}: expected {name} {version}, as here, found {found.get(name)!s:.40}. "
                    "Install the same packages on all machines of the site."
                )


class RemoteRank:
    """A rank on a node: its channel is a connection to that machine.

    Args:
        node: Where it is started.
        seat: Its place; the interface is the node's to find.
        logs: The folder of logs, which the node must see under the same path.
        mark: A folder in it that is there while the ranks are.
    """

    def __init__(self, node: Node, seat: Seat, logs: Path, mark: Path):
        self.number, self._node = seat.number, node
        self.channel, _ = node.connect()
        with suppress(ChannelClosedError):  # its end is found where its answer is awaited
            self.channel.send(name="rank", seat=asdict(seat), logs=str(logs), mark=str(mark))

    def kill(self) -> None:
        """Close its connection, with which it ends."""
        self.channel.close()

    def receive(self) -> Message:
        """Its next message, or its end; clocks differ from machine to machine."""
        try:
            message = self.channel.receive()
        except ChannelClosedError:
            how = f"was lost, with {self._node.name}"
            return {"error": how, "traceback": "", "time": time.monotonic(), "is_dead": True}
        return message | ({"time": time.monotonic()} if "error" in message else {})


def nodes_of_site() -> list[Node]:
    """The machines that this site's environment names beside this one.

    Raises:
        ReportableError: The list can't be read, or there is no secret.
    """
    listed = os.environ.get(NODES, "")
    if not listed:
        return []
    file = os.environ.get(VARIABLE)
    secret = read_secret(Path(file) if file else None)
    entries = enumerate(listed.split(","), 1)
    return [Node(n, *address_of(entry.strip(), f"{NODES}, entry {n}"), secret) for n, entry in entries]


def address_of(text: str, argument: str) -> tuple[str, int]:
    """Host and port of ``10.0.0.2:29400``, ``node-2:29400`` or ``[fd00::2]:29400``.

    Raises:
        ReportableError: It is not of that form.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 <= int(port) < 2**16:
        raise ReportableError(f"{argument}: expected an address such as 10.0.0.2:29400, found another form.")
    return host, int(port)


def interface_of(address: str) -> str:
    """The network interface that has an address; empty if none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return ""


def packages() -> dict[str, str]:
    """The versions that must be the same on all machines, for the same bits."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
