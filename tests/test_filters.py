"""The filters on real NVFlare messages, serialized by NVFlare's own FOBS."""

import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_copy
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_common.decomposers import common_decomposers
from nvflare.fuel.utils import fobs

from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.flare.headers import ERROR_HEADER, WIRE_MARKER
from nvflare_llm_components.quantization.message import META_KEY
from tests.pairs import Client, Server, random
from tests.pairs import message as round_message
from tests.sites import Site

BROADCAST = "broadcast-1"
common_decomposers.register()  # as every FLARE process does at its start


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(50, 32, generator=generator),
        "layer.weight": torch.randn(33, 65, generator=generator) * 1e-3,
        "norm.weight": torch.ones(65),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }


def message(data, kind: str = DataKind.WEIGHTS, root_id: str | None = None) -> Shareable:
    shareable = DXO(kind, data, meta={"NUM_STEPS_CURRENT_ROUND": 5}).to_shareable()
    if root_id:
        shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, root_id)
    return shareable


def over_the_wire(shareable: Shareable) -> Shareable:
    return fobs.loads(fobs.dumps(shareable))


def quantized(shareable: Shareable, **args) -> Shareable:
    return PrecisionQuantizeFilter(**args).process(shareable, FLContext())


def dequantized(shareable: Shareable, **args) -> DXO:
    return from_shareable(PrecisionDequantizeFilter(**args).process(shareable, FLContext()))


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 0), ("fp16", 1e-3), ("bf16", 8e-3), ("int8", 0.02), ("nf4", 0.3)]
)
def test_a_message_comes_back_through_fobs(precision, tolerance, kind):
    sent = weights()
    arrived = over_the_wire(quantized(message(sent, kind), precision=precision))
    dxo = dequantized(arrived)
    assert dxo.data_kind == kind
    assert list(dxo.data) == list(sent)
    for name, value in sent.items():
        assert dxo.data[name].dtype == value.dtype
        assert dxo.data[name].shape == value.shape
        assert torch.allclose(
            dxo.data[name].float(), value.float(), atol=tolerance * float(value.float().abs().max())
        )
    assert dxo.meta["NUM_STEPS_CURRENT_ROUND"] == 5
    assert META_KEY not in dxo.meta
    assert dxo.get_filter_history() == ["PrecisionQuantizeFilter", "PrecisionDequantizeFilter"]


def test_the_payload_is_contiguous_bytes_and_small_vectors_travel_as_they_are():
    dxo = from_shareable(quantized(message(weights()), precision="int8"))
    assert dxo.data["embed.weight"].dtype == torch.uint8
    assert dxo.data["embed.weight"].shape == (1600 + 2 * 13,)
    assert dxo.data["norm.weight"].dtype == torch.float32
    assert dxo.data["steps"].dtype == torch.int64
    assert all(value.is_contiguous() for value in dxo.data.values())
    assert json.loads(json.dumps(dxo.meta[META_KEY])) == dxo.meta[META_KEY]


def test_the_source_message_is_not_touched():
    sent = weights()
    before = {name: value.clone() for name, value in sent.items()}
    shareable = message(sent)
    shared_meta = from_shareable(shareable).meta
    quantized(make_copy(shareable), precision="int8")
    assert all(
        torch.equal(sent[name], before[name]) and sent[name].dtype == before[name].dtype for name in before
    )
    assert shared_meta == {"NUM_STEPS_CURRENT_ROUND": 5}


def test_a_resent_message_is_not_encoded_twice():
    once = quantized(message(weights()), precision="nf4")
    first = dict(from_shareable(once).data)
    twice = quantized(once, precision="nf4")
    assert all(from_shareable(twice).data[name] is value for name, value in first.items())
    assert torch.allclose(dequantized(twice).data["embed.weight"], weights()["embed.weight"], atol=1.0)


def test_one_encode_serves_all_clients_of_a_broadcast_in_any_thread(tmp_path):
    shareable, quantize = message(weights(), root_id=BROADCAST), PrecisionQuantizeFilter(precision="int8")
    server, client = Site(tmp_path / "server", "server"), Site(tmp_path / "site-1", "site-1")
    results: list[DXO] = []

    def serve():
        results.append(from_shareable(quantize.process(make_copy(shareable), server.context(peer=client))))

    threads = [threading.Thread(target=serve) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({id(dxo.data["embed.weight"]) for dxo in results}) == 1
    ledger = [json.loads(line) for line in (server.run_dir / "traffic.jsonl").read_text().splitlines()]
    assert [record["cached"] for record in ledger].count(False) == 1
    assert {record["peer"] for record in ledger} == {"site-1"}
    assert all(dxo.get_filter_history() == ["PrecisionQuantizeFilter"] for dxo in results)


def test_changed_values_under_the_same_task_are_encoded_anew(tmp_path):
    quantize, server = PrecisionQuantizeFilter(precision="fp16"), Site(tmp_path, "server")
    for seed in (0, 1):  # a relay keeps its task while the model changes
        out = quantize.process(message(weights(seed), root_id=BROADCAST), server.context())
        assert torch.allclose(dequantized(out).data["embed.weight"], weights(seed)["embed.weight"], atol=0.01)


def test_numpy_comes_back_as_numpy():
    sent = {"w": np.random.default_rng(0).normal(size=(40, 40)), "n": np.arange(3), "flag": True}
    dxo = dequantized(over_the_wire(quantized(message(sent), precision="int8")))
    assert isinstance(dxo.data["w"], np.ndarray)
    assert dxo.data["w"].dtype == np.float32
    np.testing.assert_allclose(dxo.data["w"], sent["w"], atol=0.02)
    np.testing.assert_array_equal(dxo.data["n"], sent["n"])
    assert dxo.data["flag"] is True


def test_messages_of_others_pass_untouched():
    for shareable in (message(weights()), Shareable(), DXO(DataKind.METRICS, {"loss": 1.0}).to_shareable()):
        before = dict(shareable)
        after = PrecisionDequantizeFilter().process(shareable, FLContext())
        assert after is shareable
        assert dict(after) == before


def test_each_member_of_a_collection_is_filtered_and_the_shared_one_left_alone():
    parts = {"a": DXO(DataKind.WEIGHTS, weights(0)), "b": DXO(DataKind.WEIGHT_DIFF, weights(1))}
    shareable = DXO(DataKind.COLLECTION, parts).to_shareable()
    out = from_shareable(quantized(make_copy(shareable), precision="fp16"))
    assert {name: META_KEY in part.meta for name, part in out.data.items()} == {"a": True, "b": True}
    assert all(META_KEY not in part.meta for part in parts.values())
    back = dequantized(over_the_wire(out.to_shareable()))
    assert torch.allclose(back.data["b"].data["embed.weight"], weights(1)["embed.weight"], atol=0.01)


def test_lazy_values_are_averaged_in_float32_by_the_aggregation_helper():
    helper = WeightedAggregationHelper()
    for client, (precision, num_tokens) in enumerate([("fp16", 70), ("int8", 1000), ("nf4", 3)]):
        arrived = over_the_wire(quantized(message({"w": torch.full((4, 40), 1000.0)}), precision=precision))
        lazy = dequantized(arrived, lazy=True).data
        assert not isinstance(lazy["w"], torch.Tensor)
        helper.add(lazy, num_tokens, f"site-{client}", 0)
    mean = helper.get_result()["w"]
    assert mean.dtype == torch.float32
    assert torch.allclose(mean, torch.tensor(1000.0), rtol=0.01)


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ({"precision": "int7"}, "int7"),
        ({"block_size": 100}, "100"),
        ({"overrides": {"(": "fp16"}}, "regular expression"),
        ({"overrides": {"a": "fp8"}}, "fp8"),
    ],
)
def test_a_wrong_configuration_fails_when_the_job_is_parsed(args, found):
    with pytest.raises(ValueError, match=found.replace("(", "\\(")):
        PrecisionQuantizeFilter(**args)
    with pytest.raises(ValueError, match="float12"):
        PrecisionDequantizeFilter(restore_dtype="float12")


def test_the_first_matching_override_decides():
    overrides = {"norm": "int8", "embed|norm": "fp32"}
    dxo = from_shareable(quantized(message(weights()), precision="fp16", overrides=overrides))
    codecs = {name: entry["codec"] for name, entry in dxo.meta[META_KEY]["params"].items()}
    assert codecs == {
        "embed.weight": "raw",
        "layer.weight": "fp16",
        "norm.weight": "int8",
        "steps": "raw",
        "mask": "raw",
    }


def test_another_process_reads_the_message(tmp_path: Path):
    file = tmp_path / "message.fobs"
    file.write_bytes(fobs.dumps(quantized(message(weights()), precision="nf4")))
    code = """
import sys
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.utils import fobs
from nvflare_llm_components.filters import PrecisionDequantizeFilter
dequantize = PrecisionDequantizeFilter()
shareable = fobs.loads(open(sys.argv[1], "rb").read())
print(from_shareable(dequantize.process(shareable, FLContext())).data["embed.weight"].double().sum().item())
"""
    printed = subprocess.check_output([sys.executable, "-c", code, str(file)], text=True)
    here = dequantized(over_the_wire(quantized(message(weights()), precision="nf4")))
    assert float(printed) == here.data["embed.weight"].double().sum().item()


def test_the_adapters_look_for_the_wire_formats_own_marker():
    assert WIRE_MARKER == META_KEY


def fire(site: Site, event: str, key: str, shareable: Shareable) -> None:
    fl_ctx = site.context()
    fl_ctx.set_prop(key, shareable, private=True, sticky=False)
    site.fire_event(event, fl_ctx)


def test_a_client_without_dequantizer_fails_at_its_first_result(tmp_path):
    server, client = Server(tmp_path, precision="int8"), Client(tmp_path, precision="int8")
    task = server.send(round_message(random(1), 0), client)
    fire(client.site, EventType.AFTER_TASK_DATA_FILTER, FLContextKey.TASK_DATA, task)
    client.fl_ctx = client.site.context()
    with pytest.raises(ValueError, match=r"Add PrecisionDequantizeFilter .* task_data_filters of the client"):
        client.send(random(1), 0)


def test_a_server_without_dequantizer_refuses_each_result_and_says_why(tmp_path):
    server, client = Server(tmp_path, precision="int8"), Client(tmp_path, precision="int8")
    client.receive(server.send(round_message(random(1), 0), client))
    result = client.send(random(1), 0)
    fire(server.site, EventType.AFTER_TASK_RESULT_FILTER, FLContextKey.TASK_RESULT, result)
    assert server.site.panic is None  # one site could forge the marker
    assert result.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR
    assert "task_result_filters of the server" in result.get_header(ERROR_HEADER)
    assert "DXO" not in result


def test_a_failure_on_the_server_ends_the_job_instead_of_the_round(tmp_path):
    server, client = Server(tmp_path, precision="nf4"), Client(tmp_path)
    (server.site.run_dir / "filter_state").write_text("a file where a folder should be")
    server.send(round_message(random(1), 0), client)
    assert "could not encode the message" in server.site.panic


def test_a_message_of_full_precision_is_warned_of_once(tmp_path, caplog):
    server, client = Server(tmp_path), Client(tmp_path)
    for _ in range(2):
        server.receive(round_message(random(1), 0), client)
    assert caplog.text.count("no PrecisionQuantizeFilter in the client's task_result_filters") == 1


def test_the_broadcast_is_let_go_when_results_arrive_unless_it_is_a_step_of_the_shadow(tmp_path):
    for precision, is_kept in (("int8", False), ("nf4", True)):
        server, client = Server(tmp_path / precision, precision=precision), Client(tmp_path / precision)
        task = round_message(random(1), 0)
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
    client.receive(server.send(round_message(random(1), 0), client))
    client.send(random(1), 0)
    assert client.site.events.count("analytix_log_stats") == 2


@pytest.mark.parametrize("precision", ["nf4", "int2"])
@pytest.mark.parametrize("overrides", [None, {"embed": "int2"}])
def test_whole_weights_do_not_travel_by_a_code_for_differences_and_that_is_said_once(
    tmp_path, precision, overrides, caplog
):
    args = {"precision": precision if overrides is None else "bf16", "overrides": overrides}
    quantize, site = PrecisionQuantizeFilter(**args), Site(tmp_path, "site-1")
    for _ in range(2):
        sent = from_shareable(quantize.process(message(weights()), site.context()))
    codecs = {name: entry["codec"] for name, entry in sent.meta[META_KEY]["params"].items()}
    assert codecs["embed.weight"] == "int8"
    assert "int2" not in codecs.values()
    assert caplog.text.count("Set params_type to DIFF") == 1
    update = from_shareable(quantize.process(message(weights(), DataKind.WEIGHT_DIFF), site.context()))
    assert update.meta[META_KEY]["params"]["embed.weight"]["codec"] == (overrides or {}).get(
        "embed", precision
    )


@pytest.mark.parametrize("task", ["submit_model", "get_weights", "validate"])
def test_tasks_of_whole_models_are_not_warned_of(tmp_path, task, caplog):
    site = Site(tmp_path, "site-1")
    sent = PrecisionQuantizeFilter(precision="nf4").process(message(weights()), site.context(task))
    assert "nf4" not in str(from_shareable(sent).meta[META_KEY])
    assert "DIFF" not in caplog.text


@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4", "int2"])
def test_restore_dtype_source_gives_a_bfloat16_model_back_as_it_was(tmp_path, precision):
    model = {"w": torch.randn(64, 64).bfloat16(), "norm": torch.ones(64, dtype=torch.bfloat16)}
    server, site = Site(tmp_path / "server", "server"), Site(tmp_path / "site-1", "site-1")
    quantize = PrecisionQuantizeFilter(precision=precision)
    for current_round in range(2):
        sent = quantize.process(round_message(model, current_round), server.context(peer=site))
        restored = PrecisionDequantizeFilter(restore_dtype="source").process(sent, site.context())
        assert {value.dtype for value in from_shareable(restored).data.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "is_kept"), [("server", False), ("site-1", True)])
def test_what_is_downloaded_of_a_job_holds_no_filter_state(tmp_path: Path, name: str, is_kept: bool):
    """A site keeps its own: it may be resumed."""
    site = Site(tmp_path, name, PrecisionQuantizeFilter(precision="nf4"))
    (site.run_dir / "filter_state").mkdir()
    (site.run_dir / "filter_state/shadow.safetensors").touch()
    site.fire_event(EventType.END_RUN, site.new_context())
    assert (site.run_dir / "filter_state/shadow.safetensors").exists() == is_kept
