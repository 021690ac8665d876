import json
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nvflare_llm_components.tools.report import report


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def write(file: Path, *records: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    round_ = {"num_rounds": 2, "train_loss": 2.0, "bytes_out": 1000, "bytes_in": 500, "seconds": 3.0}
    rounds = [round_ | {"round": n, "eval_loss": 3.0 - n, "missing": ["<b>"] * n} for n in range(2)]
    write(tmp_path / "ws/server/simulate_job/rounds.jsonl", *rounds)
    write(tmp_path / "ws/server/simulate_job/final_evaluation.json", {"eval_loss": 1.5, "sites": {}})
    for site in ("site-1", "<script>alert(1)"):
        write(
            tmp_path / "ws" / site / "simulate_job/metrics.jsonl",
            {"kind": "eval", "step": 0, "round": 0, "eval_loss": 3.0},
            {"kind": "train", "step": 1, "round": 0, "loss": 2.0, "learning_rate": 1e-3, "epoch": 1},
            {"kind": "round", "round": 0, "start_step": 0, "end_step": 7},
        )
    return tmp_path / "ws"


def test_a_page_has_all_and_needs_nothing_beside_it(workspace, tmp_path):
    page = Page(report(workspace, tmp_path / "out/report.html").read_text())
    text = " ".join(page.words)
    assert "2 rounds at 2 sites, eval loss 3.0000 to 1.5000" in text
    for cell in ("site-1", "1.0 kB", "500 bytes", "3 s", "final model", "1.5000"):
        assert cell in page.words
    assert "ws site-1" not in text
    assert [source.startswith("data:image/png;base64,") for source in page.sources] == [True]
    assert "script" not in page.tags
    assert page.tags.count("table") == 2  # no message is recorded
    assert "b" not in page.tags  # names are text


def test_messages_and_origin_are_told_where_they_are_recorded(workspace, tmp_path):
    server = workspace / "server/simulate_job"
    line = {"site": "server", "peer": "site-1", "direction": "out", "operation": "quantize", "round": 0}
    line |= {"bytes_before": 4000, "bytes_after": 1000, "num_saturated": 0, "num_nonfinite": 0}
    write(server / "traffic.jsonl", line | {"seconds": 0.1, "relative_error": 0.0065})
    chain = {"base": {"name": "<i>base"}, "packages": {"torch": "2.13.0"}}
    write(server / "global_model/last/federation.json", chain)
    page = Page(report(workspace, tmp_path / "report.html").read_text())
    for cell in ("to the sites", "25.0%", "6.5e-03", "Base model: <i>base. Trained with torch 2.13.0."):
        assert cell in page.words
    assert "from the sites" not in page.words
    write(server / "global_model/last/federation.json", {"base": []})
    assert "Base model" not in report(workspace, tmp_path / "report.html").read_text()


def test_a_downloaded_job_has_a_page(workspace, tmp_path):
    """There the sites' own records are not: the server's tell of each."""
    rounds = workspace / "server/simulate_job/rounds.jsonl"
    told = [
        json.loads(line) | {"sites": {"a": {"eval_loss": 3.0}}} for line in rounds.read_text().splitlines()
    ]
    write(tmp_path / "results/0123/workspace/rounds.jsonl", *told)
    (tmp_path / "results/0123/meta.json").write_text('{"name": "mine<b>"}')
    page = Page(report(tmp_path / "results/0123", tmp_path / "report.html").read_text())
    assert page.words.count("mine<b> (0123)") == 2
    assert "2 rounds at 1 site, eval loss 3.0000 to 2.0000" in page.words
    assert "rounds" in page.words


def test_where_the_servers_records_are_gone_the_sites_tell(workspace, tmp_path):
    """FLARE removes a server's run directory when a job has ended."""
    shutil.rmtree(workspace / "server")
    last = {"kind": "eval", "step": 7, "round": 1, "eval_loss": 2.0}
    for file in workspace.glob("*/simulate_job/metrics.jsonl"):
        file.write_text(file.read_text() + json.dumps(last) + "\n")
    page = Page(report(workspace, tmp_path / "report.html").read_text())
    assert "1 round at 2 sites, eval loss 3.0000 to 2.0000" in page.words
    assert "Rounds" not in page.words


def test_a_folder_without_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Found none"):
        report(tmp_path, tmp_path / "report.html")


HUGE = {"kind": "train", "step": 2**62, "round": 1, "loss": 1e308, "learning_rate": 1e308}


@pytest.mark.parametrize("step", [2**62, -(2**62), 5])
@pytest.mark.parametrize("loss", [1e308, float("inf"), float("nan")])
def test_numbers_out_of_all_reason_stop_no_report(step, loss, workspace, tmp_path):
    """They ended it with a singular matrix."""
    file = workspace / "site-1/simulate_job/metrics.jsonl"
    with file.open("a") as records:
        for record in (HUGE | {"loss": loss}, {"kind": "eval", "step": step, "round": 0, "eval_loss": loss}):
            records.write(json.dumps(record) + "\n")
    assert report(workspace, tmp_path / "report.html").is_file()


def test_thousands_of_rounds_take_no_minutes(workspace, tmp_path):
    """Thirty thousand took more than a minute and a half: a line for each."""
    rounds = [{"kind": "round", "round": n, "start_step": n, "end_step": n + 1} for n in range(20_000)]
    write(
        workspace / "site-1/simulate_job/metrics.jsonl", {"kind": "eval", "step": 0, "eval_loss": 1}, *rounds
    )
    started = time.process_time()
    assert report(workspace, tmp_path / "report.html").is_file()
    assert time.process_time() - started < 20
