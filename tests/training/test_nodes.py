"""A site of two machines: two groups on this one, the same bits; strangers; a node that is lost."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from torch import distributed

from nvflare_llm_components.training import nodes, secret
from nvflare_llm_components.training.broadcast import Broadcast
from nvflare_llm_components.training.group import processes_for, seats
from nvflare_llm_components.training.node import NodeServer
from nvflare_llm_components.training.nodes import NODES, Node, RemoteRank, interface_of, nodes_of_site
from nvflare_llm_components.training.process import Seat
from nvflare_llm_components.training.ranks import RankError
from nvflare_llm_components.training.secret import VARIABLE, read_secret
from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.worker import TrainingStoppedError
from tests.training.test_ranks import (
    NUM_ROUNDS,
    curve_of,
    needs_two_cores,
    one_round,
    pids_of,
    settings_of,
    torchrun,
    train_but_kill,
    wait_until_gone,
)

SECRET = b"0123456789abcdef" * 2
LOOPBACK = "127.0.0.1"


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_bytes(SECRET)
    file.chmod(0o600)
    return file


@pytest.fixture
def server() -> Iterator[NodeServer]:
    server = NodeServer(LOOPBACK, 0, SECRET)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.close()
    thread.join()


def node_of(port: int, known: bytes = SECRET) -> Node:
    return Node(1, LOOPBACK, port, known)


def test_a_node_tells_its_site_what_it_has(server):
    assert node_of(server.port).devices(is_on_gpu=False) == len(os.sched_getaffinity(0))


def test_a_caller_with_another_secret_is_sent_away(server):
    with pytest.raises(ValueError, match=f"node 1 of {NODES}: expected it to share this site's secret"):
        node_of(server.port, b"f" * 32).devices(is_on_gpu=False)


def test_who_does_not_know_the_secret_learns_a_random_number(server):
    seen = []
    for _ in range(2):
        with socket.create_connection((LOOPBACK, server.port)) as stranger:
            first = stranger.recv(32)
            stranger.sendall(first * 2)
            assert stranger.recv(1) == b""
            seen.append(first)
    assert seen[0] != seen[1]


def test_a_proof_is_good_for_one_connection(server, monkeypatch):
    said = []

    def listen(connection: socket.socket, data: bytes) -> None:
        said.append(data)
        connection.sendall(data)

    monkeypatch.setattr(secret, "_send", listen)
    node_of(server.port).connect()[0].close()
    (of_site,) = (data for data in said if len(data) == 64)
    monkeypatch.undo()
    with socket.create_connection((LOOPBACK, server.port)) as again:
        again.recv(32)
        again.sendall(of_site)
        assert again.recv(1) == b""


def test_silent_strangers_are_few_and_do_not_stay(server, monkeypatch):
    monkeypatch.setattr(secret, "_SECONDS", 1.0)
    silent = [socket.create_connection((LOOPBACK, server.port)) for _ in range(16)]
    assert all(stranger.recv(32) for stranger in silent)
    with socket.create_connection((LOOPBACK, server.port)) as one_more:
        assert one_more.recv(1) == b""
    for stranger in silent:
        assert stranger.recv(1) == b""
        stranger.close()
    assert node_of(server.port).devices(is_on_gpu=False)


def test_one_who_speaks_a_byte_at_a_time_does_not_stay_either(server, monkeypatch):
    monkeypatch.setattr(secret, "_SECONDS", 0.5)
    with socket.create_connection((LOOPBACK, server.port)) as slow:
        slow.settimeout(0.1)
        started = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - started < 5:
                slow.send(b"x")
                time.sleep(0.1)
        assert time.monotonic() - started < 4


def test_a_false_node_is_not_believed():
    def pretend(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"n" * 32)
            said = connection.recv(64)
            connection.sendall(said[32:])

    with socket.create_server((LOOPBACK, 0)) as listener:
        threading.Thread(target=pretend, args=[listener]).start()
        with pytest.raises(ValueError, match="expected it to share this site's secret"):
            node_of(listener.getsockname()[1]).devices(is_on_gpu=False)


def test_a_node_that_is_not_there_is_named():
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=f"node 1 of {NODES}: expected `nvflare-llm node` to answer"):
        node_of(port).devices(is_on_gpu=False)


def test_a_node_with_other_packages_is_refused(server, monkeypatch):
    monkeypatch.setattr(nodes, "_PACKAGES", ("torch", "pytest"))
    node = node_of(server.port)
    assert node.devices(is_on_gpu=False)
    with pytest.raises(ValueError, match=r"node 1 .*: expected torch 2\..*, as here, found 0\.1"):
        node._check_packages({"torch": "0.1"})


def test_a_node_that_does_not_see_the_sites_folder_starts_nothing(server, tmp_path):
    seat = Seat(number=1, num_processes=2, local_number=0, num_local=1, interface="lo")
    rank = RemoteRank(node_of(server.port), seat, tmp_path, tmp_path / "not mounted")
    assert "expected the site's run directory under its own path" in rank.receive()["error"]
    assert "with node 1" in rank.receive()["error"]
    rank.kill()
    assert not list(tmp_path.glob("rank-*"))


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (SECRET, 0o640, "open to others"),
        (SECRET[:31], 0o600, "found 31"),
        (b" " * 40, 0o600, "found 0"),
        (b"x" * 5000, 0o600, "found 4097"),
    ],
)
def test_a_secret_that_is_none_is_refused(content, mode, reason, secret_file):
    secret_file.write_bytes(content)
    secret_file.chmod(mode)
    with pytest.raises(ValueError, match=f"{VARIABLE}: .*{reason}"):
        read_secret(secret_file)


def test_a_site_without_a_secret_uses_no_node(monkeypatch):
    monkeypatch.setenv(NODES, "10.0.0.2:29400")
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match=f"{VARIABLE}: expected a file"):
        nodes_of_site()


@pytest.mark.parametrize("text", ["10.0.0.2", ":29400", "10.0.0.2:x", "10.0.0.2:99999", "a:1,,b:2", "a:-1"])
def test_a_list_of_nodes_that_is_none_is_refused(text, monkeypatch, secret_file):
    monkeypatch.setenv(NODES, text)
    monkeypatch.setenv(VARIABLE, str(secret_file))
    with pytest.raises(ValueError, match=rf"{NODES}, entry \d: expected an address"):
        nodes_of_site()


def test_nodes_are_those_of_the_list(monkeypatch, secret_file):
    monkeypatch.setenv(NODES, "node-2:29400, [fd00::2]:29401")
    monkeypatch.setenv(VARIABLE, str(secret_file))
    found = [(node.number, node.host, node.port, node.secret) for node in nodes_of_site()]
    assert found == [(1, "node-2", 29400, SECRET), (2, "fd00::2", 29401, SECRET)]


def test_a_machine_is_filled_before_the_next_one():
    found = [(m, s.number, s.local_number, s.num_local) for m, s in seats(5, [2, 2, 4], "")]
    assert found == [(0, 0, 0, 2), (0, 1, 1, 2), (1, 2, 0, 2), (1, 3, 1, 2), (2, 4, 0, 1)]
    with pytest.raises(ValueError, match=r"expected devices for 9 .*, found 8"):
        list(seats(9, [2, 2, 4], ""))


def test_an_address_has_an_interface():
    assert interface_of(LOOPBACK) == "lo"
    assert interface_of("192.0.2.1") == ""


def test_any_dtype_is_sent():
    values = {
        "a": torch.tensor([[1.5, -0.0], [float("inf"), 2.0]]),
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        "c": torch.tensor(3),
        "d": torch.empty(0, 2),
        "e": torch.tensor([True, False]),
    }
    layout = {name: (tuple(value.shape), value.dtype) for name, value in values.items()}
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sent = Broadcast(layout, values)
        assert list(sent) == list(values)
        for name, value in values.items():
            found = sent[name].materialize()
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
    finally:
        distributed.destroy_process_group()


@contextmanager
def started_node(core: int, secret_file: Path) -> Iterator[subprocess.Popen]:
    """The command of a node, with one core, at a free port."""
    command = [sys.executable, "-m", "nvflare_llm_components.cli", "node", f"{LOOPBACK}:0"]
    with subprocess.Popen(
        ["taskset", "-c", str(core), *command, "--secret-file", str(secret_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as node:
        try:
            yield node
        finally:
            node.terminate()
            node.wait(30)


@pytest.fixture
def node(secret_file, monkeypatch) -> Iterator[subprocess.Popen]:
    """This site has one core here, and another one on its node."""
    here, there, *_ = cores = sorted(os.sched_getaffinity(0))
    with started_node(there, secret_file) as process:
        assert process.stdout
        found = re.search(r"port (\d+)", process.stdout.readline())
        assert found
        monkeypatch.setenv(NODES, f"{LOOPBACK}:{found[1]}")
        monkeypatch.setenv(VARIABLE, str(secret_file))
        os.sched_setaffinity(0, {here})
        yield process
        os.sched_setaffinity(0, cores)


def remote_pids(node: subprocess.Popen) -> list[int]:
    return [child.pid for child in psutil.Process(node.pid).children() if "rank" in " ".join(child.cmdline())]


@needs_two_cores
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sharding"),
    [("sft", "none"), ("sft-accumulation-cosine", "full"), ("lora", "none"), ("lora", "full")],
)
def test_two_machines_also_killed_and_resumed_are_one_torchrun(
    case, sharding, model_folder, data_file, tmp_path, node
):
    given, expected, curve = torchrun(case, sharding, model_folder, data_file, tmp_path / "torchrun")
    settings, folder = settings_of(model_folder, data_file, case, sharding=sharding), tmp_path / "run"
    session = SFTSession(settings, folder)
    for number in range(2):
        given = one_round(session, number, given)
    (local,), (remote,) = pids_of(session), remote_pids(node)
    started = time.monotonic()
    with pytest.raises(RankError, match="Rank 1 of 2 was killed by SIGKILL"):
        train_but_kill(session, 2, given, remote)
    assert time.monotonic() - started < 10
    wait_until_gone([local, remote])
    session.close()

    with closing(SFTSession(settings, folder)) as session:
        found = one_round(session, 2, given)
        assert found.keys() == expected.keys()
        assert not [name for name in expected if not torch.equal(found[name], expected[name])]
        assert curve_of(folder) == curve
        pids = pids_of(session) + remote_pids(node)
        assert len(pids) == 2
        session.begin_round(3, NUM_ROUNDS, lambda: True, first_round=0)
        with pytest.raises(TrainingStoppedError):
            session.train_round()
    wait_until_gone(pids)
    assert not list((folder / "rank_logs").glob(".nvflare-llm-*"))


@needs_two_cores
@pytest.mark.slow
def test_a_lost_node_is_named_and_none_of_its_ranks_goes_on(model_folder, data_file, tmp_path, node):
    settings = settings_of(model_folder, data_file, local_epochs=None, local_steps=10**6)
    session = SFTSession(settings, tmp_path / "run")
    pids = pids_of(session) + remote_pids(node)
    started = time.monotonic()
    with pytest.raises(RankError, match=f"Rank 1 of 2 was lost, with node 1 of {NODES}"):
        train_but_kill(session, 0, session.snapshot(), node.pid, pids[1])
    assert time.monotonic() - started < 20
    session.close()
    wait_until_gone(pids)
    with pytest.raises(ValueError, match=f"node 1 of {NODES}: expected `nvflare-llm node` to answer"):
        processes_for(settings)


@needs_two_cores
@pytest.mark.slow
def test_a_node_that_ends_takes_its_ranks_along(model_folder, data_file, tmp_path, node):
    session = SFTSession(settings_of(model_folder, data_file), tmp_path / "run")
    pids = remote_pids(node)
    assert len(pids) == 1
    node.terminate()
    wait_until_gone(pids)
    with pytest.raises(RankError, match=r"Rank 1 of 2 was (killed by SIGKILL|lost)"):
        session.evaluate()
    session.close()


def test_the_list_of_nodes_does_not_matter_where_they_are_not_needed(model_folder, data_file, monkeypatch):
    monkeypatch.setenv(NODES, "not even an address")
    assert processes_for(settings_of(model_folder, data_file, num_processes=1)) == 1
    assert json.dumps(settings_of(model_folder, data_file).to_json()).count("not even") == 0
