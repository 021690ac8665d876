import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nvflare_llm_components.cli import app
from nvflare_llm_components.tools.traffic import read_ledgers, show_traffic, summarize
from tests.pairs import Client, Server, message

BYTES = 4096 + 64  # of a 64 x 64 weight at int8


def model() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(64, 64)}


@pytest.fixture
def workspace(tmp_path):
    """Three rounds of a server and two sites, as their filters write them."""
    server = Server(tmp_path, precision="int8")
    sites = [
        Client(tmp_path, name, precision="int8") for name in ("a-site-with-a-rather-long-name", "site-2")
    ]
    for current_round in range(3):
        for site in sites:
            site.receive(server.send(message(model(), current_round), site))
            server.receive(site.send(model(), current_round), site)
    return tmp_path


def test_each_message_is_counted_once_though_both_ends_wrote_it_down(workspace):
    lines = summarize(read_ledgers(workspace))
    assert [(line.site, line.round, line.direction) for line in lines] == [
        (site, current_round, direction)
        for site in ("a-site-with-a-rather-long-name", "site-2")
        for current_round in range(3)
        for direction in ("down", "up")
    ]
    assert {(line.num_messages, line.full_bytes, line.wire_bytes) for line in lines} == {(1, 16384, BYTES)}
    assert all(0 < line.relative_error < 0.01 for line in lines)


@pytest.mark.parametrize("end", ["server", "site-2"])
def test_the_ledger_of_one_end_suffices(workspace, end):
    lines = [line for line in summarize(read_ledgers(workspace / end)) if line.site == "site-2"]
    assert [line.wire_bytes for line in lines] == [BYTES] * 6
    assert {line.direction for line in lines if line.relative_error is None} == (
        {"up"} if end == "server" else {"down"}
    )


def test_a_message_that_never_arrived_is_counted(tmp_path):
    server, site = Server(tmp_path, precision="int8"), Client(tmp_path, "site-2", precision="int8")
    for _ in range(2):
        sent = server.send(message(model(), 0), site)
    site.receive(sent)
    (line,) = summarize(read_ledgers(tmp_path))
    assert (line.num_messages, line.wire_bytes) == (2, 2 * BYTES)


def test_a_torn_line_of_a_ledger_is_passed_over(workspace):
    ledger = next(workspace.rglob("traffic.jsonl"))
    ledger.write_text(ledger.read_text() + '{"site": "serv')
    assert len(summarize(read_ledgers(workspace))) == 12


@pytest.mark.parametrize("width", [80, 200])
def test_table_and_plot_whose_numbers_stay_whole_in_80_columns(workspace, capsys, width):
    plot = show_traffic(workspace, console=Console(width=width))
    out = capsys.readouterr().out
    assert f"{12 * BYTES:,} bytes on the wire, 0.2539 of full precision" in " ".join(out.split())
    assert out.count("4.2 kB") == 12
    assert out.count("0.2539") == 13
    assert max(map(len, out.splitlines())) <= width
    assert plot == workspace / "traffic.png"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_rounds_are_counted_from_1_and_the_last_evaluation_is_named(workspace, capsys):
    for ledger in workspace.rglob("traffic.jsonl"):
        lines = [json.loads(line) for line in ledger.read_text().splitlines()]
        final = [line | {"round": 3, "task": "validate"} for line in lines[-1:]]
        ledger.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *final]))
    show_traffic(workspace / "site-2", console=Console(width=80))
    cells = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [cell[3].strip() for cell in cells] == ["1", "1", "2", "2", "3", "3", "final"]


def test_json_is_exact(workspace):
    result = CliRunner().invoke(app, ["traffic", str(workspace), "--json"])
    assert result.exit_code == 0, result.output
    lines = json.loads(result.stdout)
    assert sum(line["wire_bytes"] for line in lines) == 12 * BYTES
    assert not (workspace / "traffic.png").exists()


def test_a_folder_without_ledgers_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected traffic\.jsonl"):
        show_traffic(tmp_path)


def test_a_sites_name_is_no_markup_no_formula_and_no_command(workspace, capsys):
    ledger = next(workspace.rglob("site-2/**/traffic.jsonl"))
    record = json.loads(ledger.read_text().splitlines()[0])
    names = ("[link=https://a.b]$\\frac$[/]", "[/oops]", "a\x1b[2J")
    wrong = [{"bytes_after": "\x1b[2J"}, {"seconds": []}, {"site": 3}, {"num_saturated": None}]
    lines = [record | {"site": name} for name in names] + [record | change for change in wrong]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines) + "7\n")
    show_traffic(ledger.parent, console=Console(width=200, force_terminal=True))
    out = capsys.readouterr().out
    assert "[link=https://a.b]$\\frac$[/]" in out
    assert "[/oops]" in out
    assert "a\\x1b[2J" in out
    assert "\x1b]8" not in out  # no link
    assert "\x1b[2J" not in out
    assert len(summarize(read_ledgers(ledger.parent))) == len(names)
