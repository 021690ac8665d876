"""What rounding leaves out is made up for, in every case that the server accepted; and nothing twice."""

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DataKind
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nvflare_llm_components.tensors.lazy import Deferred
from tests.pairs import Client, Server, message, random


def rounds_of_feedback(
    server: Server, client: Client, rounds: list[int], lost: tuple[int, ...] = ()
) -> torch.Tensor:
    """Sends the same update in each round; returns the sum of what the server took."""
    total = torch.zeros(60, 40)
    for current_round in rounds:
        client.restart()  # as the simulator does with fewer threads than clients
        client.receive(server.send(message(random(1), current_round), client))
        sent = client.send(random(7, 1e-3), current_round)
        if current_round not in lost:
            total += server.receive(sent, client)["embed.weight"]
    return total


@pytest.mark.parametrize("downlink", ["fp32", "bf16"])
def test_error_feedback_makes_up_for_rounding_over_process_restarts(tmp_path, downlink):
    meant = 10 * random(7, 1e-3)["embed.weight"]
    errors = {}
    for feedback in (False, True):
        folder = tmp_path / str(feedback)
        client = Client(folder, precision="nf4", error_feedback=feedback)
        total = rounds_of_feedback(Server(folder, precision=downlink), client, list(range(10)))
        errors[feedback] = float((total - meant).norm() / meant.norm())
    assert errors[False] > 0.08
    assert errors[True] < 0.015


def test_the_residual_is_what_rounding_left_out(tmp_path):
    server, client = Server(tmp_path), Client(tmp_path, precision="nf4", error_feedback=True)
    client.receive(server.send(message(random(1), 0), client))
    taken = server.receive(client.send(random(7), 0), client)["embed.weight"]
    residual = load_file(client.site.run_dir / "filter_state" / "residual_0.safetensors")
    assert torch.equal(residual["embed.weight"], (random(7)["embed.weight"] - taken).bfloat16())
    assert sorted(residual) == ["embed.weight", "layer.weight"]


def test_an_update_that_is_made_as_it_is_read_is_fed_back_alike(tmp_path):
    taken, left = [], []
    for is_lazy in (False, True):
        folder = tmp_path / str(is_lazy)
        server, client = Server(folder), Client(folder, precision="nf4", error_feedback=True)
        for current_round in range(2):
            client.receive(server.send(message(random(1), current_round), client))
            update = random(current_round)
            sent = {name: lazily(value) for name, value in update.items()} if is_lazy else update
            taken.append(server.receive(client.send(sent, current_round), client)["embed.weight"])
        left.append(load_file(client.site.run_dir / "filter_state" / "residual_1.safetensors"))
    assert all(torch.equal(*pair) for pair in zip(taken[:2], taken[2:], strict=True))
    assert left[0].keys() == left[1].keys()
    assert all(torch.equal(left[0][name], left[1][name]) for name in left[0])


def lazily(value: torch.Tensor) -> Deferred:
    return Deferred(lambda: iter([value.reshape(-1)]), value.shape, value.dtype)


def test_a_residual_that_no_taken_update_left_is_dropped_and_says_so(tmp_path, caplog):
    server, client = Server(tmp_path), Client(tmp_path, precision="nf4", error_feedback=True)
    rounds_of_feedback(server, client, [0], lost=(0,))
    with caplog.at_level(logging.WARNING):
        total = rounds_of_feedback(server, client, [1])
    assert "dropped the residuals of rounds (0,)" in caplog.text
    alone = rounds_of_feedback(
        Server(tmp_path / "b"), Client(tmp_path / "b", precision="nf4", error_feedback=True), [1]
    )
    assert torch.equal(total, alone)


def test_error_feedback_on_weights_is_refused_at_the_first_task(tmp_path):
    server, client = Server(tmp_path), Client(tmp_path, precision="int8", error_feedback=True)
    client.receive(server.send(message(random(1), 0), client))
    with pytest.raises(ValueError, match="params_type to DIFF"):
        client.send(random(1), 0, DataKind.WEIGHTS)


FATES = ["accepted"] * 7 + ["lost", "late", "repeated", "absent", "refused", "server dies"]


def residual_of(client: Client, taken: int) -> torch.Tensor:
    folder = client.site.run_dir / "filter_state"
    return load_file(folder / f"residual_{taken}.safetensors")["embed.weight"].double()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    precision=st.sampled_from(["nf4", "int2", "int8", "fp16"]),
    fates=st.lists(st.sampled_from(FATES), min_size=50, max_size=50),
    does_restart=st.booleans(),
)
def test_fifty_rounds_of_accepted_updates_sum_to_what_was_meant(
    tmp_path_factory, precision, fates, does_restart
):
    """Lost, late, repeated, absent and refused: exact but for the last residual, and each one's rounding."""
    folder = tmp_path_factory.mktemp("federation")
    server, client = Server(folder), Client(folder, precision=precision, error_feedback=True)
    meant, decoded, taken, late = torch.zeros(60, 40).double(), torch.zeros(60, 40).double(), None, None
    rounding = 0.0
    for current_round, fate in enumerate(fates):
        if fate == "server dies":
            server.restart()
        if late is not None:  # FLARE decodes it and gives it to no aggregator
            server.receive(late, client, is_accepted=False)
            late = None
        if fate == "absent":
            continue
        update = random(100 + current_round, 1e-3)
        for _ in range(2 if fate == "repeated" else 1):  # given twice, since the first answer never left
            if does_restart:
                client.restart()
            client.receive(server.send(message(random(1), current_round), client))
            sent = client.send(update, current_round)
        if fate == "late":
            late = sent
        elif fate == "refused":
            server.receive(sent, client, is_accepted=False)
        elif fate != "lost":
            decoded += server.receive(sent, client)["embed.weight"].double()
            meant += update["embed.weight"].double()
            taken = current_round
            rounding += 2**-8 * float(residual_of(client, taken).norm())
    if taken is not None:
        error = meant - decoded - residual_of(client, taken)
        assert float(error.norm()) <= 1e-6 * float(meant.norm()) + rounding


def test_a_round_that_is_repeated_after_the_server_died_starts_from_the_residual_before_it(tmp_path):
    """The server took round 2 and died before it saved: the run that continues begins with round 2 again."""
    server, client = Server(tmp_path), Client(tmp_path, precision="int2", error_feedback=True)
    rounds_of_feedback(server, client, [0, 1])
    before = residual_of(client, 1)
    rounds_of_feedback(server, client, [2])
    server.restart()
    again = rounds_of_feedback(server, client, [2]).double()
    meant = random(7, 1e-3)["embed.weight"].double() + before
    left_out = residual_of(client, 2)
    assert ((again + left_out - meant).abs() <= 2**-8 * left_out.abs() + 1e-9).all()


def test_no_more_than_two_residuals_stay_on_the_disk(tmp_path):
    server, client = Server(tmp_path), Client(tmp_path, precision="nf4", error_feedback=True)
    rounds_of_feedback(server, client, list(range(6)), lost=(3, 4))
    kept = sorted(path.name for path in (client.site.run_dir / "filter_state").glob("residual*"))
    assert kept == ["residual_2.safetensors", "residual_5.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"\xff" * 200])
def test_a_residual_that_the_disk_lost_costs_what_it_carried_and_no_round(tmp_path, damage):
    server, client = Server(tmp_path), Client(tmp_path, precision="nf4", error_feedback=True)
    rounds_of_feedback(server, client, [0])
    (client.site.run_dir / "filter_state" / "residual_0.safetensors").write_bytes(damage)
    assert rounds_of_feedback(server, client, [1]).norm() > 0


@pytest.mark.parametrize("text", ["", "[1]", '{"site-1": 3}', '{"site-1": ["x"]}', "{"])
def test_a_torn_record_of_what_was_taken_is_as_none(tmp_path, text):
    server, client = Server(tmp_path), Client(tmp_path, precision="nf4", error_feedback=True)
    rounds_of_feedback(server, client, [0])
    (server.site.run_dir / "filter_state" / "taken.json").write_text(text)
    server.restart()
    assert rounds_of_feedback(server, client, [1]).norm() > 0


def test_a_residual_in_float32_of_an_earlier_release_is_carried_over(tmp_path):
    server, client = Server(tmp_path), Client(tmp_path, precision="nf4", error_feedback=True)
    rounds_of_feedback(server, client, [0])
    file = client.site.run_dir / "filter_state" / "residual_0.safetensors"
    kept = {name: value.float() + 1.0 for name, value in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        label = opened.metadata()
    save_file(kept, file, label)
    sent = rounds_of_feedback(server, client, [1]).double()
    meant = random(7, 1e-3)["embed.weight"].double() + kept["embed.weight"].double()
    left_out = residual_of(client, 1)
    assert ((sent + left_out - meant).abs() <= 2**-8 * left_out.abs() + 1e-6).all()
