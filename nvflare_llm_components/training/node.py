"""One of a site's further machines: starts ranks for the site's front end, and for nobody else."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.training.channel import Channel, ChannelClosedError, Message
from nvflare_llm_components.training.nodes import interface_of, packages
from nvflare_llm_components.training.process import RankProcess, Seat, devices_here
from nvflare_llm_components.training.secret import StrangerError, admit

logger = logging.getLogger(__name__)
_MAX_STRANGERS = 16
_FAREWELL_S = 5.0


class NodeServer:
    """Listens for a site's front end. Each of its connections asks what there is here, or becomes a rank's.

    A rank is the process of one connection, and ends with it.

    Args:
        host: Address to listen at.
        port: And port; 0 for any.
        secret: What the site's front end must know.
    """

    def __init__(self, host: str, port: int, secret: bytes):
        self._secret = secret
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self._strangers = threading.BoundedSemaphore(_MAX_STRANGERS)
        self._ranks: set[RankProcess] = set()
        self._is_closed = False

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def run(self) -> None:
        """Serve until :meth:`close`, or KeyboardInterrupt; then end the ranks."""
        try:
            while not self._is_closed:
                # A caller may be gone again before it is accepted.
                with suppress(OSError):
                    self._accept()
        finally:
            self._listener.close()
            for rank in list(self._ranks):
                rank.kill()
            self._say_farewell()

    def close(self) -> None:
        """Let :meth:`run` return."""
        self._is_closed = True
        self._listener.shutdown(socket.SHUT_RDWR)

    def _say_farewell(self) -> None:
        """Wait until the end of each rank is told: the way out of this process takes longer than it does."""
        deadline = time.monotonic() + _FAREWELL_S
        while self._ranks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _accept(self) -> None:
        connection, address = self._listener.accept()
        if self._strangers.acquire(blocking=False):
            arguments = (connection, str(address[0]))
            threading.Thread(target=self._greet, args=arguments, daemon=True).start()
        else:
            connection.close()

    def _greet(self, connection: socket.socket, address: str) -> None:
        try:
            admit(connection, self._secret)
        except StrangerError:
            connection.close()
            logger.warning("%s does not know this site's secret: its connection was closed.", address)
            return
        finally:
            self._strangers.release()
        local = str(connection.getsockname()[0])
        channel = Channel.of_socket(connection)
        # What can't be sent need not be: the front end is gone.
        try:
            with suppress(ChannelClosedError):
                self._serve(channel, channel.receive(), local)
        finally:
            channel.close()

    def _serve(self, channel: Channel, request: Message, local: str) -> None:
        if request["name"] == "about":
            channel.send(packages=packages(), devices=devices_here(request["is_on_gpu"]))
            return
        seat, logs = Seat(**request["seat"]), Path(request["logs"])
        try:
            _check_shared(Path(request["mark"]))
            with self._started(replace(seat, interface=interface_of(local)), logs, channel) as rank:
                death = rank.death()
                logger.info("Rank %d of %d %s.", seat.number, seat.num_processes, death["error"])
                channel.send(**death)
        except (ReportableError, OSError) as error:
            channel.send(error=f"could not be started: {error}", traceback="", is_dead=True)

    @contextmanager
    def _started(self, seat: Seat, logs: Path, channel: Channel) -> Iterator[RankProcess]:
        rank = RankProcess(seat, logs, channel)
        logger.info("Rank %d of %d is process %d.", seat.number, seat.num_processes, rank.pid)
        self._ranks.add(rank)
        try:
            yield rank
        finally:
            self._ranks.discard(rank)


def _check_shared(mark: Path) -> None:
    """Each rank writes its part of the site's state into one folder."""
    if not mark.is_dir():
        raise ReportableError(
            "expected the site's run directory under its own path on this node, too, found it missing. Mount "
            "FLARE's workspace, the models and the data on all machines of the site under the same paths"
        )
