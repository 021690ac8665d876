"""What the tables of figures take from records."""

import json

import pytest

from benchmarks import figures, record
from benchmarks.evidence import summarize
from benchmarks.evidence_cell import SITES


def test_losses_are_told_where_several_seeds_were_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    assert "seeds" not in figures.precisions()
    row = {"mode": "sft", "way": "int8", "num_seeds": 3, "final": 2.0, "spread": 0.01, "ratio": 0.25}
    row |= {"excess": 0.001, "excess_spread": 0.0002, "bytes_to_reach": 3_400_000}
    row |= {"best": 1.9, "best_excess": -0.002, "best_excess_spread": 0.0}
    run = {"command": "python -m benchmarks.convergence", "date": "2026-11-26", "commit": "0123456789"}
    runs = [run | {"rows": [row]}, run | {"rows": [row | {"num_seeds": 1, "final": 9.0}]}]
    (tmp_path / "convergence.jsonl").write_text("".join(json.dumps(each) + "\n" for each in runs))
    text = figures.precisions()
    assert "| messages (3 seeds) |" in text
    sft = "1.9000 (-0.20% ± 0.00%) | 2.0000 (+0.10% ± 0.02%) | 3.4 MB"
    assert f"| int8 | 25.0% | {sft} |  |  |  |" in text


def test_the_length_of_rounds_tells_what_a_job_takes_over_training_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    pure = {"run": "pure", "seconds": 30.0}
    ours, stock, messages = (
        {"run": name, "of_pure": share}
        for name, share in (("ours-int8", 1.6), ("stock", 2.5), ("messages", 0.4))
    )
    short = {"num_rounds": 3, "num_steps": 5, "model_bytes": 2**20, "rows": [pure, ours, stock, messages]}
    long = short | {"num_steps": 40, "rows": [pure, ours | {"of_pure": 1.05}, messages]}
    lines = "".join(json.dumps(each) + "\n" for each in (short | {"rows": [pure, messages]}, short, long))
    (tmp_path / "round_overhead.jsonl").write_text(lines)
    first, second = figures.round_overhead()
    assert first[1:] == ("stock `flare.patch` 2.50 x", "1.60 x int8; 0.40 x is FLARE's messages alone")
    assert second[1:] == ("", "1.05 x int8; 0.40 x is FLARE's messages alone")


def test_evidence_is_paired_with_fedavg_and_tells_its_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    assert "No run is recorded" in figures.evidence()
    losses = {"dolly": 3.0, "alpaca": 2.0, "union": 2.5, "spread": 0.01, "num_seeds": 3}
    fedavg = {"name": "FedAvg", **losses, "over_fedavg": 0.0, "over_fedavg_range": [0, 0], "bytes": 1200}
    alone = {
        **fedavg,
        "name": "dolly alone",
        "over_fedavg": 0.1,
        "over_fedavg_range": [-0.1, 0.2],
        "bytes": 0,
    }
    scale = {"num_rounds": 3, "local_steps": 5, "batch_size": 2, "learning_rate": 0.002, "max_length": 80}
    run = {"command": "python -m benchmarks.evidence", "date": "2026-11-26", "commit": "0123456789"}
    run |= {**scale, "eval_rows": 12, "sites": ["dolly", "alpaca"], "rows": [alone, fedavg]}
    (tmp_path / "evidence.jsonl").write_text(json.dumps(run) + "\n")
    text = figures.evidence()
    assert "| dolly alone | 3 | 3.000 | 2.000 | 2.500 | 0.010 | +0.100 (-0.100 to +0.200) |  |" in text
    assert "| FedAvg | 3 | 3.000 | 2.000 | 2.500 | 0.010 |  | 1,200 |" in text
    assert "3 rounds of 5 steps of 2 rows" in text


def test_differences_to_fedavg_are_those_of_the_same_seed():
    losses = {"FedAvg": [2.0, 3.0], "dolly alone": [2.1, 2.8], "base": [4.0]}
    cells = [
        {"plan": plan, "seed": seed, "losses": dict.fromkeys(SITES, loss), "bytes_down": 5, "bytes_up": 6}
        for plan, each in losses.items()
        for seed, loss in enumerate(each)
    ]
    lines = {line["name"]: line for line in summarize(cells)}
    assert list(lines) == ["base", "dolly alone", "FedAvg"]
    assert lines["dolly alone"]["over_fedavg"] == pytest.approx(-0.05)
    assert lines["dolly alone"]["over_fedavg_range"] == pytest.approx([-0.2, 0.1])
    assert lines["base"]["over_fedavg"] == pytest.approx(1.5)
    assert (lines["FedAvg"]["bytes"], lines["dolly alone"]["bytes"]) == (11, 0)
    (fedprox,) = [
        line for line in summarize([*cells, {**cells[3], "plan": "FedProx"}]) if line["name"] == "FedProx"
    ]
    assert fedprox["num_seeds"] == 1
    assert fedprox["over_fedavg"] == pytest.approx(-0.2)
