import io
import json
import os
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from nvflare_llm_components.tools.view import View, watch


def write(file: Path, *records: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)


def round_record(number: int, **changes: object) -> dict:
    return {
        "round": number,
        "num_rounds": 3,
        "eval_loss": 3.0 - number,
        "missing": [],
        "bytes_out": 2_000_000,
        "bytes_in": 1_000_000,
        "seconds": 30.0,
        **changes,
    }


def train(step: int, number: int = 0) -> dict:
    return {"kind": "train", "step": step, "round": number, "loss": 2.5, "epoch": 1.0}


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


LAYOUTS = {
    "simulator": ("ws", "ws/server/simulate_job", "ws/site-1/simulate_job"),
    "poc": (
        "poc",
        "poc/example_project/prod_00/server/0123",
        "poc/example_project/prod_00/site-1/0123",
    ),
    "kit of the server": ("server", "server/0123", "elsewhere/site-1/0123"),
    "run directory": ("server/0123", "server/0123", "elsewhere/site-1/0123"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_finds_the_run_in_every_layout(tmp_path, console, layout):
    folder, server, site = (tmp_path / name for name in LAYOUTS[layout])
    write(server / "rounds.jsonl", round_record(0), round_record(1, missing=["site-2"]))
    write(site / "metrics.jsonl", train(7))
    view = View(folder, console)
    text = view.text()
    assert "2 rounds done, about 30 s left; 4.0 MB out, 2.0 MB in" in text
    assert ("site-1     round 1, step 7, loss 2.50" in text) == site.is_relative_to(folder)
    printed = console.file.getvalue()
    assert "round 2 of 3: eval loss 2.0000 before it, 3.0 MB, 30 s, without site-2" in printed
    view.text()
    assert console.file.getvalue() == printed  # told once
    assert view.losses() == [3.0, 2.0]
    assert not view.is_over()


def test_a_run_that_is_over_is_told_round_by_round(tmp_path, console):
    write(tmp_path / "server/0123/rounds.jsonl", round_record(0), round_record(1))
    done = {"kind": "round", "num_steps": 5, "train_loss": 2.0}
    write(tmp_path / "site-1/0123/metrics.jsonl", *(done | {"round": number} for number in range(2)))
    View(tmp_path, console).text()
    told = [line.split(":")[0].split() for line in console.file.getvalue().splitlines()]
    assert [line[:3] for line in told] == [
        ["site-1", "round", "1"],
        ["round", "1", "of"],
        ["site-1", "round", "2"],
        ["round", "2", "of"],
    ]


def test_on_a_sites_machine_and_after_a_job_the_sites_records_say_that_it_is_over(tmp_path, console):
    done = {"kind": "round", "num_steps": 5, "train_loss": 2.0, "num_rounds": 2}
    for site in ("site-1", "site-2"):
        write(tmp_path / site / "0123/metrics.jsonl", train(1), done | {"round": 0})
    view = View(tmp_path, console)
    assert not view.is_over()
    assert "No round is done yet" not in view.text()
    write(tmp_path / "site-1/0123/metrics.jsonl", done | {"round": 1})
    assert not view.is_over()
    write(tmp_path / "site-2/0123/metrics.jsonl", done | {"round": 1})
    assert view.is_over()
    watch(tmp_path, console)
    assert "site-2     round 2: 5 steps" in console.file.getvalue()


def test_of_several_jobs_it_shows_the_latest(tmp_path, console):
    write(tmp_path / "server/old/rounds.jsonl", round_record(2))
    write(tmp_path / "server/new/rounds.jsonl", round_record(0))
    os.utime(tmp_path / "server/old/rounds.jsonl", (1, 1))
    assert not View(tmp_path, console).is_over()


def test_what_an_earlier_run_left_is_not_shown(tmp_path, console):
    write(tmp_path / "server/simulate_job/rounds.jsonl", round_record(2))
    view = View(tmp_path, console, since=time.time() + 1000)
    assert view.text() == "No round is done yet."
    assert view.rounds() == []


def test_before_a_run_there_is_something_to_show(tmp_path, console):
    assert View(tmp_path / "nowhere", console).text() == "No round is done yet."
    assert View(tmp_path, console).final() == {}


def test_the_final_evaluation_is_read(tmp_path, console):
    file = tmp_path / "server/simulate_job/final_evaluation.json"
    write(file, {"round": 2, "eval_loss": 1.5, "sites": {"a": 1.5}})
    assert View(tmp_path, console).final()["sites"] == {"a": 1.5}


def test_watch_ends_with_the_last_round(tmp_path, console):
    watcher = threading.Thread(target=watch, args=(tmp_path, console, 0.01))
    watcher.start()
    write(tmp_path / "server/0123/rounds.jsonl", *(round_record(number) for number in range(3)))
    watcher.join(30)
    assert not watcher.is_alive()
    assert "round 3 of 3" in console.file.getvalue()


WRONG = ["\x1b]52;c;cHduZWQ=\x07", None, [], {}, True, 10**400, {"a": "\x1b[2J"}]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("key", ["num_rounds", "eval_loss", "missing", "bytes_out", "bytes_in", "seconds"])
def test_a_round_from_elsewhere_gives_the_terminal_no_commands(tmp_path, console, key, wrong):
    write(tmp_path / "server/0123/rounds.jsonl", round_record(0), round_record(1, **{key: wrong}))
    view = View(tmp_path, console)
    told = view.text() + console.file.getvalue()
    assert "2 rounds done" in told
    assert all(c.isprintable() or c == "\n" for c in told)
    assert not view.is_over()


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("key", ["kind", "round", "step", "loss", "eval_loss", "num_steps", "train_loss"])
def test_a_sites_line_from_elsewhere_gives_the_terminal_no_commands(tmp_path, console, key, wrong):
    done = {"kind": "round", "round": 0, "num_steps": 5, "train_loss": 2.0}
    evaluated = {"kind": "eval", "round": 0, "step": 5, "eval_loss": 2.0}
    lines = [record | {key: wrong} for record in (train(7), done, evaluated) if key in record]
    write(tmp_path / "site-1\x1b[2J/0123/metrics.jsonl", train(3), *lines)
    told = View(tmp_path, console).text() + console.file.getvalue()
    assert "site-1\\x1b[2J" in told
    assert all(c.isprintable() or c == "\n" for c in told)


def test_a_name_in_a_round_is_told_escaped(tmp_path, console):
    write(
        tmp_path / "server/0123/rounds.jsonl", round_record(0, missing=["\x1b[31mFAKE\nround 3 of 3: good"])
    )
    View(tmp_path, console).text()
    assert "without \\x1b[31mFAKE\\nround 3 of 3: good" in console.file.getvalue()


@pytest.mark.parametrize(
    "text", ['"a"\n', "[1]\n", "[" * 100_000 + "\n", "no JSON\n", '{"eval_loss": "a"}\n', "\xff\n"]
)
def test_what_is_no_record_is_passed_over(tmp_path, console, text):
    folder = tmp_path / "server/0123"
    folder.mkdir(parents=True)
    for name in ("rounds.jsonl", "metrics.jsonl", "final_evaluation.json"):
        (folder / name).write_bytes(text.encode("latin-1"))
    view = View(tmp_path, console)
    assert view.text().startswith("No round is done yet.")
    assert view.final().get("eval_loss") is None
