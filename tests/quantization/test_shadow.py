"""What all clients have decoded stands on every disk, bit for bit, whatever the disk or the model does."""

from pathlib import Path

import pytest
import torch
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.shareable import make_copy

from nvflare_llm_components.quantization.message import META_KEY
from tests.pairs import Client, Server, codecs, message, random


@pytest.fixture(params=["nf4", "int2"])
def precision(request) -> str:
    return request.param


def test_a_broadcast_at_four_bits_keeps_all_shadows_bit_equal_and_follows_the_model(tmp_path):
    server = Server(tmp_path, precision="nf4")
    clients = [Client(tmp_path, f"site-{i}") for i in range(3)]
    model = random(1)
    for current_round in range(5):
        if current_round == 3:
            clients[1].restart()  # with its disk
            clients[2] = Client(tmp_path / "new disk", "site-2")
        task = message(model, current_round)
        present = [
            client for client in clients if (client.name, current_round) != ("site-0", 2)
        ]  # misses a round
        sent = [server.send(make_copy(task), client) for client in present]
        received = [client.receive(each) for client, each in zip(present, sent, strict=True)]
        absolute = {0: ["site-0", "site-1", "site-2"], 3: ["site-0", "site-2"]}.get(current_round, [])
        for client, each in zip(present, sent, strict=True):
            assert codecs(each) == ({"bf16", "raw"} if client.name in absolute else {"nf4", "raw"})
        for data in received:
            assert torch.equal(data["embed.weight"], received[0]["embed.weight"])
            assert torch.equal(data["embed.weight"], server.shadow()["embed.weight"].float())
            assert torch.equal(data["norm.weight"], model["norm.weight"])
            error = (data["embed.weight"] - model["embed.weight"]).norm() / model["embed.weight"].norm()
            assert error < 0.003  # bfloat16 is 0.0017; nf4 of the weights themselves would be 0.09
        model = {name: value + random(50 + current_round, 1e-2)[name] for name, value in model.items()}
    assert server.site.panic is None


def test_small_updates_reach_clients_in_the_long_run(tmp_path):
    server, client = Server(tmp_path, precision="nf4"), Client(tmp_path)
    model, step = random(1), random(2, 1e-4)["embed.weight"]  # far below a bfloat16 step of most weights
    start = client.receive(server.send(message(dict(model), 0), client))["embed.weight"]
    for current_round in range(1, 60):
        model = {**model, "embed.weight": model["embed.weight"] + step}
        end = client.receive(server.send(message(dict(model), current_round), client))["embed.weight"]
    moved, meant = end - start, 59 * step
    assert float((moved - meant).norm() / meant.norm()) < 0.5
    assert torch.dot(moved.flatten(), meant.flatten()) / (moved.norm() * meant.norm()) > 0.9


def test_a_task_that_is_sent_again_finds_the_client_where_it_is(tmp_path):
    server, client = Server(tmp_path, precision="nf4"), Client(tmp_path)
    client.receive(server.send(message(random(1), 0), client))
    task = message(random(2), 1)
    first = client.receive(server.send(make_copy(task), client))
    again = client.receive(server.send(make_copy(task), client))
    assert torch.equal(first["embed.weight"], again["embed.weight"])


def test_a_difference_to_a_shadow_that_is_not_here_is_refused_and_changes_nothing(tmp_path):
    server, client, other = Server(tmp_path, precision="nf4"), Client(tmp_path), Client(tmp_path, "site-2")
    client.receive(server.send(message(random(1), 0), client))
    difference = server.send(message(random(2), 1), client)
    assert codecs(difference) == {"nf4", "raw"}
    with pytest.raises(ValueError, match=r"starts from shadow \w+. Found none"):
        other.receive(difference)
    assert not (other.site.run_dir / "filter_state" / "shadow.safetensors").exists()


def test_a_shadow_that_would_come_out_different_is_refused(tmp_path):
    server, client = Server(tmp_path, precision="nf4"), Client(tmp_path)
    client.receive(server.send(message(random(1), 0), client))
    before = client.shadow()
    difference = server.send(message(random(2), 1), client)
    from_shareable(difference).meta[META_KEY]["shadow"]["id"] = "00000000"
    with pytest.raises(ValueError, match="should be 00000000 after this message"):
        client.receive(difference)
    assert torch.equal(client.shadow()["embed.weight"], before["embed.weight"])


def test_models_to_evaluate_are_not_sent_at_four_bits_and_leave_the_shadow_alone(tmp_path):
    server, client = Server(tmp_path, precision="nf4"), Client(tmp_path)
    client.receive(server.send(message(random(1), 0), client))
    before = client.shadow()
    assert codecs(server.send(message(random(9), None), client)) == {"int8", "raw"}
    assert torch.equal(server.shadow()["embed.weight"], before["embed.weight"])


def flip_a_bit(site) -> None:
    file: Path = site.run_dir / "filter_state" / "shadow.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("damage", ["a bit", "the header", "truncated", "empty"])
@pytest.mark.parametrize("is_new_process", [True, False])
def test_a_shadow_that_the_disk_changed_is_not_told_and_the_next_message_is_absolute(
    tmp_path, damage, is_new_process
):
    server, client = Server(tmp_path, precision="nf4"), Client(tmp_path)
    client.receive(server.send(message(random(1), 0), client))
    file = client.site.run_dir / "filter_state" / "shadow.safetensors"
    data = file.read_bytes()
    if damage == "a bit":
        flip_a_bit(client.site)
    else:
        file.write_bytes(
            {"the header": b"\xff" * 50 + data[50:], "truncated": data[:-7], "empty": b""}[damage]
        )
    client.restart() if is_new_process else client.site.fire_event(
        EventType.AFTER_SEND_TASK_RESULT, client.site.new_context()
    )
    sent = server.send(message(random(2), 1), client)
    assert codecs(sent) == {"bf16", "raw"}
    assert torch.equal(client.receive(sent)["embed.weight"], server.shadow()["embed.weight"].float())


def test_a_bit_that_flips_while_a_difference_is_on_its_way_costs_one_task_and_no_more(tmp_path):
    server, client = Server(tmp_path, precision="nf4"), Client(tmp_path)
    client.receive(server.send(message(random(1), 0), client))
    difference = server.send(message(random(2), 1), client)
    flip_a_bit(client.site)
    with pytest.raises(ValueError, match="after this message"):
        client.receive(difference)
    sent = server.send(message(random(3), 2), client)
    assert codecs(sent) == {"bf16", "raw"}
    assert torch.equal(client.receive(sent)["embed.weight"], server.shadow()["embed.weight"].float())


def test_a_servers_shadow_that_the_disk_changed_is_begun_anew(tmp_path):
    server, client = Server(tmp_path, precision="nf4"), Client(tmp_path)
    client.receive(server.send(message(random(1), 0), client))
    flip_a_bit(server.site)
    sent = server.send(message(random(2), 1), client)
    assert codecs(sent) == {"bf16", "raw"}
    assert server.site.panic is None
    arrived = client.receive(sent)["embed.weight"]
    assert torch.equal(arrived, random(2)["embed.weight"].bfloat16().float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_round_is_gone_with_the_next(tmp_path, precision, bad):
    server, client = Server(tmp_path, precision=precision), Client(tmp_path)
    model = random(1)
    broken = {**model, "embed.weight": model["embed.weight"].clone()}
    broken["embed.weight"][3, 4] = bad
    finite = []
    for current_round, sent in enumerate([model, broken, *[model] * 12]):
        data = client.receive(server.send(message(dict(sent), current_round), client))["embed.weight"]
        shadows = [side.shadow()["embed.weight"].view(torch.int16) for side in (server, client)]
        assert torch.equal(*shadows)
        finite.append(bool(data.isfinite().all()))
    assert finite == [True, False, *[True] * 12]
    assert float((data - model["embed.weight"]).norm() / model["embed.weight"].norm()) < 0.01


def test_an_override_is_shadowed_by_what_its_codec_is_for_and_not_by_the_name_of_the_precision(tmp_path):
    server = Server(tmp_path, precision="int8", overrides={"embed": "int2"})
    client = Client(tmp_path)
    for current_round in range(3):
        sent = server.send(message(random(1), current_round), client)
        client.receive(sent)
    entries = from_shareable(sent).meta[META_KEY]["params"]
    assert {name: entry["codec"] for name, entry in entries.items()} == {
        "layer.weight": "int8",
        "embed.weight": "int2",
        "norm.weight": "raw",
    }
    assert [name for name, entry in entries.items() if "shadow" in entry] == ["embed.weight"]
    assert list(client.shadow()) == ["embed.weight"]
