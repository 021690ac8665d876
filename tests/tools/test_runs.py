import json
import os

import pytest

from nvflare_llm_components.tools.plots import _turns, plot, smoothed
from nvflare_llm_components.tools.runs import find_runs, read_lines


def train(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 3.0 / (step + 1), "learning_rate": 1e-3, "epoch": step / 5}


METRICS = [
    {"kind": "eval", "step": 0, "round": 0, "eval_loss": 3.0},
    *(train(step) for step in range(1, 6)),
    {"kind": "round", "round": 0, "start_step": 0, "end_step": 5, "num_steps": 5, "train_loss": 2.0},
]
TRAFFIC = [
    {"operation": "quantize", "task": "train", "bytes_after": 10},
    {"operation": "quantize", "task": "train", "bytes_after": 12},
    {"operation": "dequantize", "task": "train", "bytes_after": 99},
]


def write(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def workspace(tmp_path):
    for site in ("site-1", "site-2"):
        write(tmp_path / "ws" / site / "simulate_job/metrics.jsonl", METRICS)
    write(tmp_path / "ws/site-1/simulate_job/traffic.jsonl", TRAFFIC)
    return tmp_path / "ws"


def test_a_workspace_has_a_run_for_each_site(workspace):
    first, second = find_runs(workspace)
    assert (first.label, second.label) == ("ws site-1", "ws site-2")
    assert [record["eval_loss"] for record in first.metrics("eval")] == [3.0]
    assert len(first.metrics("train")) == 5
    assert first.message_bytes() == 12
    assert second.message_bytes() is None


def test_a_folder_with_records_is_one_run(tmp_path):
    write(tmp_path / "central/metrics.jsonl", METRICS)
    (run,) = find_runs(tmp_path / "central")
    assert run.label == "central"


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected metrics.jsonl or rounds.jsonl of one run: .* Found none"):
        find_runs(tmp_path)


def test_startup_kits_have_a_run_for_each_site_of_the_latest_job(tmp_path):
    kits = tmp_path / "poc/example_project/prod_00"
    for site in ("site-1", "site-2"):
        write(kits / site / "0123/metrics.jsonl", METRICS)
    write(kits / "site-3/old/metrics.jsonl", METRICS)
    os.utime(kits / "site-3/old/metrics.jsonl", (1, 1))
    for folder in (tmp_path / "poc", kits):
        assert [run.label for run in find_runs(folder)] == [f"{folder.name} site-1", f"{folder.name} site-2"]


ROUNDS = [
    {"round": 0, "sites": {"b": {"eval_loss": 3.0, "train_loss": 2.5}, "a": {"eval_loss": 2.0}}},
    {"round": 1, "sites": {"b": {"eval_loss": 2.0, "train_loss": 1.5}}},
]


@pytest.mark.parametrize("folder", ["server/0123", "0123/workspace", "."])
def test_where_the_sites_records_are_not_the_servers_tell_of_each(tmp_path, folder):
    write(tmp_path / folder / "rounds.jsonl", ROUNDS)
    last = {"round": 1, "eval_loss": 1.0, "sites": {"b": 1.0}}
    (tmp_path / folder / "final_evaluation.json").write_text(json.dumps(last))
    a, b = find_runs(tmp_path)
    assert (a.site, b.site, b.unit) == ("a", "b", "rounds done")
    assert [(each["step"], each["eval_loss"]) for each in b.metrics("eval")] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert [(each["step"], each["loss"]) for each in b.metrics("train")] == [(1, 2.5), (2, 1.5)]
    assert [each["end_step"] for each in a.metrics("round")] == [1]
    assert a.metrics("train") == []
    assert len(plot([tmp_path], tmp_path / "curves.svg")) == 2


def test_two_runs_that_cannot_be_told_apart_are_refused(workspace):
    write(workspace.parent / "ws2/site-1/simulate_job/metrics.jsonl", METRICS)
    with pytest.raises(ValueError, match=r"of one run: .* Found several"):
        find_runs(workspace.parent)


def test_steps_and_rounds_do_not_go_on_one_axis(workspace, tmp_path):
    write(tmp_path / "told/rounds.jsonl", ROUNDS)
    with pytest.raises(ValueError, match="plot them apart"):
        plot([workspace, tmp_path / "told"], tmp_path / "curves.svg")


def test_curves_that_lie_on_each_other_take_turns_on_their_line():
    line, near, other = ([0, 1], [3.0, 1.0]), ([0, 1], [3.01, 1.01]), ([0, 1], [3.0, 2.0])
    assert _turns([line, other, near, ([7], [1.0])]) == [(0, 2), (0, 1), (1, 2), (0, 1)]
    assert _turns([([], []), ([], [])]) == [(0, 1), (0, 1)]


def test_a_line_that_is_still_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n{"kind": "tr')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"kind": "train"}]
    assert read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("name", ["curves.png", "deeper/curves.svg"])
def test_plot_draws_every_run(workspace, tmp_path, name):
    write(tmp_path / "central/metrics.jsonl", METRICS)
    drawn = plot([workspace, tmp_path / "central"], tmp_path / name)
    assert [run.label for run in drawn] == ["ws site-1", "ws site-2", "central"]
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG") or b"<svg" in content


def test_a_constant_learning_rate_takes_no_panel(workspace, tmp_path):
    def panels(name):
        plot([workspace], tmp_path / name)
        return (tmp_path / name).read_text().count('id="axes_')

    constant = panels("constant.svg")
    warmed = [
        record | {"learning_rate": record["step"] * 1e-4} for record in METRICS if record["kind"] == "train"
    ]
    write(workspace / "site-1/simulate_job/metrics.jsonl", warmed)
    assert (constant, panels("warmed.svg")) == (2, 3)


def test_svg_has_a_curve_and_a_label_for_each_run_and_round(workspace, tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        plot([workspace], tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    for label in ("site-1", "site-2", "round 1", "eval loss", "optimizer step"):
        assert label in text


def test_an_unknown_image_format_is_refused(workspace, tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        plot([workspace], tmp_path / "curves.doc")


def test_smoothed_is_the_mean_of_the_values_around():
    assert smoothed([1.0, 3.0, 5.0, 10.0], 2) == [2.0, 3.0, 6.0, 7.5]
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]
    assert smoothed([], 3) == []


def test_values_of_the_wrong_kind_are_left_out_of_a_plot(workspace, tmp_path):
    keys = ("kind", "step", "loss", "eval_loss", "learning_rate", "round", "start_step")
    wrong = [{key: value} for key in keys for value in ("\x1b[2J", [], {}, None, True, 10**400)]
    file = workspace / "site-1/simulate_job/metrics.jsonl"
    write(file, [record | change for change in ({}, *wrong) for record in METRICS])
    assert len(plot([workspace], tmp_path / "curves.svg")) == 2


def test_a_folders_name_is_no_formula_and_no_command(workspace, tmp_path):
    write(workspace / "$\\frac$\x1b[2J/simulate_job/metrics.jsonl", METRICS)
    labels = [run.label for run in plot([workspace], tmp_path / "curves.svg")]
    assert "$\\frac$\\x1b[2J" in labels
