import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from rich.console import Console

from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.tools.traffic import read_ledgers, show_traffic, summarize
from tests.sites import Site


@pytest.fixture
def workspace(tmp_path):
    client = Site(tmp_path / "site-1", "site-1")
    for current_round in range(3):
        shareable = DXO(DataKind.WEIGHTS, {"w": torch.randn(64, 64)}).to_shareable()
        shareable.set_header("current_round", current_round)
        sent = PrecisionQuantizeFilter(precision="int8").process(shareable, client.context())
        PrecisionDequantizeFilter().process(sent, client.context())
    return tmp_path


def test_each_message_is_counted_once_by_site_round_and_direction(workspace):
    lines = summarize(read_ledgers(workspace))
    assert [(line.site, line.round, line.direction) for line in lines] == [
        ("site-1", current_round, direction) for current_round in range(3) for direction in ("in", "out")
    ]
    assert {(line.num_messages, line.full_bytes, line.wire_bytes) for line in lines} == {
        (1, 16384, 4096 + 64)
    }
    assert all((line.relative_error is None) == (line.direction == "in") for line in lines)


def test_table_and_plot(workspace, capsys):
    plot = show_traffic(workspace, console=Console(width=200))
    out = capsys.readouterr().out
    assert "24,960 bytes on the wire, 0.2539 of full precision" in " ".join(out.split())
    assert plot == workspace / "traffic.png"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_ledgers_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected traffic\.jsonl"):
        show_traffic(tmp_path)
