"""The round in one line, and as a record."""

import json

from nvflare_llm_components.flare.rounds import Round


def round_of(**changes: object) -> Round:
    results = {"a": {"weight": 1.0, "eval_loss": 2.0}, "b": {"weight": 3.0, "eval_loss": 4.0}}
    settings = {
        "job_id": "j",
        "number": 2,
        "num_rounds": 20,
        "asked": ["a", "b", "c"],
        "results": results,
        "seconds": 60.0,
    }
    return Round(**(settings | changes))


def test_the_line_names_round_sites_loss_bytes_and_time():
    line = round_of(bytes_out=2_500_000_000, bytes_in=1_000).sentence(earlier_loss=4.0)
    assert line == (
        "Round 3 of 20: 2 of 3 sites, missing c, eval loss 3.5000 (-0.5000) before it, "
        "2.5 GB out, 1.0 kB in, 60 s, about 17 min left"
    )


def test_nothing_is_told_that_is_not_known():
    line = round_of(num_rounds=None, results={"a": {}, "b": {}, "c": {}}).sentence(earlier_loss=None)
    assert line == "Round 3: 3 of 3 sites, 0 B out, 0 B in, 60 s"


def test_sites_that_report_no_loss_do_not_count_in_its_mean():
    assert (
        round_of(results={"a": {"weight": 1.0}, "b": {"weight": 3.0, "eval_loss": 4.0}}).mean("eval_loss")
        == 4.0
    )
    assert round_of(results={"a": {"weight": 0.0, "eval_loss": 4.0}}).mean("eval_loss") is None


def test_the_record_is_json_with_each_sites_metrics():
    record = json.loads(json.dumps(round_of().record()))
    assert (record["round"], record["eval_loss"], record["missing"]) == (2, 3.5, ["c"])
    assert record["sites"]["b"] == {"weight": 3.0, "eval_loss": 4.0}


def test_a_sites_seconds_run_from_its_first_task_to_its_result():
    current = round_of(results={})
    current.started -= 100
    current.give("late")
    current.give("late")
    current.accept("late", {"weight": 2.0})
    current.accept("unseen", {})
    assert current.results["late"]["weight"] == 2.0
    assert current.results["late"]["seconds"] < 50
    assert current.results["unseen"]["seconds"] >= 100


def test_phases_add_up_to_what_has_passed():
    current = round_of(results={})
    current.started -= 100
    for name in ("sites", "averaging", "saving"):
        current.end_phase(name)
    phases = current.record()["seconds_by_phase"]
    assert list(phases) == ["sites", "averaging", "saving"]
    assert phases["sites"] >= 100
    assert sum(phases.values()) < 101
