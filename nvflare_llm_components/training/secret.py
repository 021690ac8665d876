"""A secret that the machines of one site share: kept in a file, proved over a socket, and never sent."""

import hmac
import secrets
import socket
import time
from pathlib import Path

from nvflare_llm_components.tensors.errors import ReportableError

VARIABLE = "NVFLARE_LLM_NODES_SECRET_FILE"
_LEAST_BYTES, _MOST_BYTES = 32, 4096
_NUM_BYTES = 32  # of a nonce, and of a proof
_SECONDS = 5.0
_OTHERS_MAY = 0o077
_SITE, _NODE = b"nvflare-llm site 1", b"nvflare-llm node 1"


class StrangerError(Exception):
    """Whoever is on the other side does not know the secret, or does not answer in time."""


def read_secret(file: Path | None) -> bytes:
    """The secret in a file that only its owner can read.

    Raises:
        ReportableError: There is no such file, it is open to others, or it holds too little.
    """
    make = f"Type: (umask 077; openssl rand -hex 32 > FILE), and set {VARIABLE} to it on each machine."
    if file is None or not file.is_file():
        raise ReportableError(f"{VARIABLE}: expected a file with the nodes' secret, found none. {make}")
    if file.stat().st_mode & _OTHERS_MAY:
        raise ReportableError(
            f"{VARIABLE}: expected a file for its owner alone, found it open to others. "
            "Type: chmod 600 FILE, and make a new secret."
        )
    with file.open("rb") as opened:
        secret = opened.read(_MOST_BYTES + 1).strip()
    if not _LEAST_BYTES <= len(secret) <= _MOST_BYTES:
        raise ReportableError(
            f"{VARIABLE}: expected {_LEAST_BYTES} to {_MOST_BYTES} bytes, found {len(secret)}. {make}"
        )
    return secret


def admit(connection: socket.socket, secret: bytes) -> None:
    """As a node: let the caller prove that it knows the secret, then prove it to the caller.

    A caller that does not learns nothing but a random number.

    Raises:
        StrangerError: It does not.
    """
    deadline, ours = time.monotonic() + _SECONDS, secrets.token_bytes(_NUM_BYTES)
    _send(connection, ours)
    theirs = _received(connection, deadline)
    _check(_received(connection, deadline), _proof(secret, _SITE, ours, theirs))
    _send(connection, _proof(secret, _NODE, ours, theirs))


def introduce(connection: socket.socket, secret: bytes) -> None:
    """As the site: prove to a node that we know the secret, and have it prove the same.

    Raises:
        StrangerError: It does not know it, or has closed the connection since we don't.
    """
    deadline, ours = time.monotonic() + _SECONDS, secrets.token_bytes(_NUM_BYTES)
    theirs = _received(connection, deadline)
    _send(connection, ours + _proof(secret, _SITE, theirs, ours))
    _check(_received(connection, deadline), _proof(secret, _NODE, theirs, ours))


def _proof(secret: bytes, role: bytes, of_node: bytes, of_site: bytes) -> bytes:
    """Of one side, for one connection: neither side's serves as the other's, nor a second time."""
    return hmac.digest(secret, role + of_node + of_site, "sha256")


def _check(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise StrangerError


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError as error:
        raise StrangerError from error


def _received(connection: socket.socket, deadline: float) -> bytes:
    data = b""
    while len(data) < _NUM_BYTES:
        try:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            more = connection.recv(_NUM_BYTES - len(data))
        except OSError as error:
            raise StrangerError from error
        if not more:
            raise StrangerError
        data += more
    return data
