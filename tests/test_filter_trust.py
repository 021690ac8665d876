"""What the filters do with messages of a hostile site, of a wrong order of filters, and with a full disk."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_copy
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.filters.exclude_vars import ExcludeVars
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
from nvflare.app_common.filters.svt_privacy import SVTPrivacy

from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.quantization.message import META_KEY, encode_message
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.quantization.shadow import advance
from tests.sites import Site


def update(seed: int = 0, scale: float = 1e-3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(40, 90, generator=generator) * scale for name in ("embed", "layer")}


def result_of(data, header=None, current_round: object = 1) -> Shareable:
    meta = {META_KEY: header} if header else None
    shareable = DXO(DataKind.WEIGHT_DIFF, dict(data), meta=meta).to_shareable()
    shareable.set_header(AppConstants.CURRENT_ROUND, current_round)
    return shareable


class Pair:
    """The server's filters and one site."""

    def __init__(self, folder: Path) -> None:
        self.quantize = PrecisionQuantizeFilter(precision="nf4")
        self.dequantize = PrecisionDequantizeFilter()
        self.server = Site(folder / "server", "server", self.quantize, self.dequantize)
        self.site = Site(folder / "site-1", "site-1")

    def broadcast(self, model, fl_ctx: FLContext | None = None) -> bytes:
        shareable = DXO(DataKind.WEIGHTS, model).to_shareable()
        shareable.set_header("__msg_root_id__", "root")
        shareable.set_header(AppConstants.CURRENT_ROUND, 0)
        self.quantize.process(shareable, fl_ctx or self.server.context(peer=self.site))
        return self.shadow()

    def shadow(self) -> bytes:
        return (self.server.run_dir / "filter_state" / "shadow.safetensors").read_bytes()

    def receive(self, shareable: Shareable) -> dict:
        return from_shareable(self.dequantize.process(shareable, self.server.context(peer=self.site))).data


@pytest.mark.parametrize("base", ["held", None])
def test_a_result_that_is_a_step_of_a_shadow_is_refused_and_the_servers_shadow_stays(tmp_path, base):
    pair = Pair(tmp_path)
    before = pair.broadcast(update(1, 1.0))
    evil = advance(update(2, 520.0), PrecisionPolicy("nf4"), tmp_path / "evil").message_for(None)
    header = evil.header
    if base:
        step = advance(update(3, 520.0), PrecisionPolicy("nf4"), tmp_path / "evil")
        evil, header = step.difference, step.difference.header
    with pytest.raises(ValueError, match="only a server's broadcast is a step of a shadow"):
        pair.receive(result_of(evil.values, header))
    bare = {key: value for key, value in header.items() if key != "shadow"}
    with pytest.raises(ValueError, match="should mark no parameter"):
        pair.receive(result_of(evil.values, bare))
    assert pair.shadow() == before
    assert pair.server.panic is None


@pytest.mark.parametrize("current_round", [{"a": [1] * 9}, "x" * 10**6, b"\xff", 2**70, -1, True], ids=repr)
def test_a_forged_round_reaches_neither_ledger_nor_log(tmp_path, current_round, caplog):
    pair = Pair(tmp_path)
    message = encode_message(update(), PrecisionPolicy("int8"))
    with caplog.at_level(logging.INFO):
        assert pair.receive(result_of(message.values, message.header, current_round))
    (line,) = (pair.server.run_dir / "traffic.jsonl").read_text().splitlines()
    assert '"round": null' in line
    assert len(line) < 1000
    assert len(caplog.text) < 2000


@pytest.mark.parametrize("disk", ["full", "unwritable"])
def test_a_ledger_that_cannot_be_written_is_logged_and_costs_no_round(tmp_path, disk, caplog):
    pair = Pair(tmp_path)
    ledger = pair.server.run_dir / "traffic.jsonl"
    ledger.symlink_to("/dev/full") if disk == "full" else ledger.mkdir()
    message = encode_message(update(), PrecisionPolicy("int8"))
    assert pair.receive(result_of(message.values, message.header))
    out = pair.quantize.process(result_of(update()), pair.server.context(peer=pair.site))
    assert META_KEY in from_shareable(out).meta
    assert caplog.text.count("The ledger lacks this message") == 2
    assert pair.server.panic is None


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # FLARE's filters on torch tensors
@pytest.mark.parametrize(
    "other", [PercentilePrivacy(), SVTPrivacy(), ExcludeVars(["layer"])], ids=lambda f: type(f).__name__
)
def test_a_filter_that_runs_on_bytes_is_named_with_the_order_as_the_cause(tmp_path, other):
    pair, fl_ctx = Pair(tmp_path), Site(tmp_path / "site-2", "site-2").context()
    encoded = PrecisionQuantizeFilter(precision="int8").process(result_of(update()), fl_ctx)
    wrong = other.process(encoded, fl_ctx)
    with pytest.raises(ValueError, match="the order of filters") as refusal:
        pair.receive(wrong)
    assert f"{type(other).__name__} ran after PrecisionQuantizeFilter" in str(refusal.value)


def test_a_filter_before_ours_is_not_blamed(tmp_path):
    pair, fl_ctx = Pair(tmp_path), Site(tmp_path / "site-2", "site-2").context()
    right = ExcludeVars(["layer"]).process(result_of(update()), fl_ctx)
    encoded = PrecisionQuantizeFilter(precision="int8").process(right, fl_ctx)
    assert list(pair.receive(make_copy(encoded))) == ["embed"]
    dxo = from_shareable(encoded)
    dxo.data["embed"] = dxo.data["embed"][:5].clone()
    with pytest.raises(ValueError, match="payload should be uint8") as refusal:
        pair.receive(dxo.update_shareable(encoded))
    assert "order of filters" not in str(refusal.value)


def test_a_forged_history_is_escaped_and_cut(tmp_path):
    pair = Pair(tmp_path)
    message = encode_message(update(), PrecisionPolicy("int8"))
    shareable = result_of({"embed": message.values["embed"]}, message.header)
    dxo = from_shareable(shareable)
    dxo.add_filter_history(["PrecisionQuantizeFilter", "x\nERROR forged", "y" * 10**6])
    with pytest.raises(ValueError, match=r"x\\nERROR forged") as refusal:
        pair.receive(dxo.update_shareable(shareable))
    assert len(str(refusal.value)) < 1000


def test_a_task_name_from_outside_is_escaped_in_the_ledger(tmp_path):
    pair = Pair(tmp_path)
    message = encode_message(update(), PrecisionPolicy("int8"))
    fl_ctx = pair.server.context(peer=pair.site)
    fl_ctx.set_prop(FLContextKey.TASK_NAME, "train\n" + "x" * 10**6, private=True, sticky=False)
    pair.dequantize.process(result_of(message.values, message.header), fl_ctx)
    assert len((pair.server.run_dir / "traffic.jsonl").read_text()) < 1000


@pytest.mark.parametrize("held", [np.array(["a", "b"]), torch.ones(3), ["x"] * 10**5, {"a": 1}, 5], ids=type)
def test_a_forged_shadow_id_of_a_site_does_not_end_the_job(tmp_path, held):
    """What a site says that it holds comes with its request: it is no more than a request for the whole."""
    pair = Pair(tmp_path)
    pair.broadcast(update(1, 1.0))
    fl_ctx = pair.server.context(peer=pair.site)
    fl_ctx.get_peer_context().put("nvflare_llm_shadow", held, private=False, sticky=False)
    assert fl_ctx.get_peer_context().get_prop("nvflare_llm_shadow") is held
    pair.broadcast(update(2, 1.0), fl_ctx)
    assert pair.server.panic is None
