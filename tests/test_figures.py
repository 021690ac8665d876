"""What the tables of figures take from records."""

import json

from benchmarks import figures, record


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
