"""Named requests and their answers as JSON, between a site's front end and its ranks. Nothing is pickled."""

import fcntl
import json
import os
import socket
from multiprocessing.connection import Connection, Pipe
from typing import Any

Message = dict[str, Any]
# Of a connection between machines: without an answer for some ten seconds the other one is gone.
_WATCH = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 5,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 5,
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 10_000,
}


class ChannelClosedError(Exception):
    """The other side is gone."""


class Channel:
    """One end of a socket pair that only these two processes hold, or of a connection to another machine.

    Args:
        connection: A connection, or the number of an inherited descriptor of one.
    """

    def __init__(self, connection: "Connection | int"):
        self.connection = Connection(connection) if isinstance(connection, int) else connection

    @classmethod
    def pair(cls) -> "tuple[Channel, Channel]":
        """Two ends, neither of which a child inherits unless it is passed on."""
        one, other = Pipe()
        return cls(one), cls(other)

    @classmethod
    def of_socket(cls, connection: socket.socket) -> "Channel":
        """The end of a connection that both sides have proved to be theirs; a dead machine ends it, too."""
        for (level, name), value in _WATCH.items():
            connection.setsockopt(level, name, value)
        connection.settimeout(None)
        return cls(Connection(connection.detach()))

    def send(self, **message: Any) -> None:
        """Send one message.

        Raises:
            ChannelClosedError: The other side is gone.
        """
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise ChannelClosedError from error

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            ChannelClosedError: The other side is gone, or what came is no message.
        """
        try:
            message: Message = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError) as error:
            raise ChannelClosedError from error
        return message

    def die_with_partner(self, is_on: bool) -> None:
        """Let the system end this process (SIGIO) when the other side is gone, whatever this one does then.

        Args:
            is_on: From now on, or no longer. While it is on, a message from the other side would do the same.

        Raises:
            ChannelClosedError: It is gone already.
        """
        descriptor = self.connection.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC if is_on else flags & ~os.O_ASYNC)
        if is_on and self.connection.poll(0):
            raise ChannelClosedError

    def close(self) -> None:
        """Close this end."""
        self.connection.close()
