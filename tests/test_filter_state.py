"""What filters keep on disk between rounds: residuals of updates and shadows of broadcasts."""

import logging
import weakref
from pathlib import Path

import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_copy
from nvflare.app_common.app_constant import AppConstants
from nvflare.fuel.utils import fobs
from safetensors.torch import load_file

from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.quantization.message import META_KEY
from tests.sites import Site


def random(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(40, 90, generator=generator) * scale,
        "embed.weight": torch.randn(60, 40, generator=generator) * scale,
        "norm.weight": torch.ones(40),
    }


def message(data, current_round: int | None, kind: str = DataKind.WEIGHTS) -> Shareable:
    shareable = DXO(kind, data).to_shareable()
    shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, f"round {current_round}")
    if current_round is not None:
        shareable.set_header(AppConstants.CURRENT_ROUND, current_round)
    return shareable


class Client:
    """A client's filter pair; `restart` is a new process on the same disk."""

    def __init__(self, folder: Path, name: str = "site-1", **args) -> None:
        self.folder, self.name, self.args = folder / name, name, args
        self.restart()

    def restart(self) -> None:
        self.dequantize, self.quantize = PrecisionDequantizeFilter(), PrecisionQuantizeFilter(**self.args)
        self.site = Site(self.folder, self.name, self.dequantize, self.quantize)

    def receive(self, shareable: Shareable) -> dict[str, torch.Tensor]:
        self.fl_ctx = self.site.context()
        return from_shareable(self.dequantize.process(fobs.loads(fobs.dumps(shareable)), self.fl_ctx)).data

    def send(self, update, current_round: int, kind: str = DataKind.WEIGHT_DIFF) -> Shareable:
        shareable = message(update, current_round, kind)
        return fobs.loads(fobs.dumps(self.quantize.process(shareable, self.fl_ctx)))

    def shadow(self) -> dict[str, torch.Tensor]:
        return load_file(self.site.run_dir / "filter_state" / "shadow.safetensors")


class Server:
    """The server's filter pair."""

    def __init__(self, folder: Path, **args) -> None:
        self.dequantize, self.quantize = PrecisionDequantizeFilter(), PrecisionQuantizeFilter(**args)
        self.site = Site(folder / "server", "server", self.dequantize, self.quantize)

    def send(self, shareable: Shareable, client: Client) -> Shareable:
        return self.quantize.process(shareable, self.site.context(peer=client.site))

    def receive(self, shareable: Shareable, client: Client) -> dict[str, torch.Tensor]:
        dxo = from_shareable(self.dequantize.process(shareable, self.site.context(peer=client.site)))
        return {name: getattr(value, "materialize", lambda v=value: v)() for name, value in dxo.data.items()}

    shadow = Client.shadow


def codecs(shareable: Shareable) -> set[str]:
    return {entry["codec"] for entry in from_shareable(shareable).meta[META_KEY]["params"].values()}


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
    residual = load_file(client.site.run_dir / "filter_state" / "residual.safetensors")
    torch.testing.assert_close(residual["embed.weight"] + taken, random(7)["embed.weight"])
    assert sorted(residual) == ["embed.weight", "layer.weight"]


def test_a_lost_round_drops_its_residual_and_says_so(tmp_path, caplog):
    server, client = Server(tmp_path), Client(tmp_path, precision="nf4", error_feedback=True)
    rounds_of_feedback(server, client, [0])
    with caplog.at_level(logging.WARNING):
        rounds_of_feedback(server, client, [1], lost=(1,))
        assert "dropped" not in caplog.text
        total = rounds_of_feedback(server, client, [2])
    assert "dropped the residual of round 1" in caplog.text
    alone = rounds_of_feedback(
        Server(tmp_path / "b"), Client(tmp_path / "b", precision="nf4", error_feedback=True), [2]
    )
    assert torch.equal(total, alone)


def test_error_feedback_on_weights_is_refused_at_the_first_task(tmp_path):
    server, client = Server(tmp_path), Client(tmp_path, precision="int8", error_feedback=True)
    client.receive(server.send(message(random(1), 0), client))
    with pytest.raises(ValueError, match="params_type to DIFF"):
        client.send(random(1), 0, DataKind.WEIGHTS)


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


def fire(site: Site, event: str, key: str, shareable: Shareable) -> None:
    fl_ctx = site.context()
    fl_ctx.set_prop(key, shareable, private=True, sticky=False)
    site.fire_event(event, fl_ctx)


def test_a_client_without_dequantizer_fails_at_its_first_result(tmp_path):
    server, client = Server(tmp_path, precision="int8"), Client(tmp_path, precision="int8")
    task = server.send(message(random(1), 0), client)
    fire(client.site, EventType.AFTER_TASK_DATA_FILTER, FLContextKey.TASK_DATA, task)
    client.fl_ctx = client.site.context()
    with pytest.raises(ValueError, match=r"Add PrecisionDequantizeFilter .* task_data_filters of the client"):
        client.send(random(1), 0)


def test_a_server_without_dequantizer_ends_the_job_at_the_first_result(tmp_path):
    server, client = Server(tmp_path, precision="int8"), Client(tmp_path, precision="int8")
    client.receive(server.send(message(random(1), 0), client))
    result = client.send(random(1), 0)
    fire(server.site, EventType.AFTER_TASK_RESULT_FILTER, FLContextKey.TASK_RESULT, result)
    assert "Add PrecisionDequantizeFilter" in server.site.panic
    assert "task_result_filters of the server" in server.site.panic


def test_a_failure_on_the_server_ends_the_job_instead_of_the_round(tmp_path):
    server, client = Server(tmp_path, precision="nf4"), Client(tmp_path)
    (server.site.run_dir / "filter_state").write_text("a file where a folder should be")
    server.send(message(random(1), 0), client)
    assert "could not encode the message" in server.site.panic


def test_a_message_of_full_precision_is_warned_of_once(tmp_path, caplog):
    server, client = Server(tmp_path), Client(tmp_path)
    for _ in range(2):
        server.receive(message(random(1), 0), client)
    assert caplog.text.count("no PrecisionQuantizeFilter in the client's task_result_filters") == 1


def test_the_broadcast_is_let_go_when_results_arrive_unless_it_is_a_step_of_the_shadow(tmp_path):
    for precision, is_kept in (("int8", False), ("nf4", True)):
        server, client = Server(tmp_path / precision, precision=precision), Client(tmp_path / precision)
        task = message(random(1), 0)
        first = from_shareable(server.send(make_copy(task), client)).data["embed.weight"]
        address = weakref.ref(first)
        del first
        server.site.fire_event(EventType.BEFORE_TASK_RESULT_FILTER, server.site.context())
        assert (address() is not None) == is_kept
        client.receive(server.send(make_copy(task), client))
        assert (
            torch.equal(server.shadow()["embed.weight"], client.shadow()["embed.weight"]) if is_kept else True
        )


def test_totals_are_streamed_as_analytics(tmp_path):
    server, client = Server(tmp_path, precision="int8"), Client(tmp_path, precision="int8")
    client.receive(server.send(message(random(1), 0), client))
    client.send(random(1), 0)
    assert client.site.events.count("analytix_log_stats") == 2
