"""The figures in the pages are those of the records, and of nothing else."""

import json
from pathlib import Path

import pytest

from benchmarks import figures, record


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_figures_of_todays_records(page: Path):
    text = page.read_text(encoding="utf-8")
    assert text == figures.written(text, figures.PAGES[page]()), "run: python -m benchmarks.figures --write"


def test_losses_are_told_where_several_seeds_were_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    assert "seeds" not in figures.precisions()
    row = {"mode": "sft", "way": "int8", "num_seeds": 3, "final": 2.0, "excess": 0.001, "ratio": 0.25}
    run = {"command": "python -m benchmarks.convergence", "date": "2026-11-26", "commit": "0123456789"}
    runs = [run | {"rows": [row]}, run | {"rows": [row | {"num_seeds": 1, "final": 9.0}]}]
    (tmp_path / "convergence.jsonl").write_text("".join(json.dumps(each) + "\n" for each in runs))
    text = figures.precisions()
    assert "| messages (3 seeds) |" in text
    assert "| int8 | 2.0000 (+0.10%), 25.0% |  |" in text
