from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.tools.cause import cause_of

ROWS = "Task 'train' failed at site 'b': ValueError: train_data: 'b.jsonl': expected columns input and output"
TASK = f"2026-11-26 04:39:06,656 - SafetensorsModelPersistor - ERROR - [identity=server, run=job]: {ROWS}"
SELECTOR = (
    "2026-11-26 04:39:06,650 - IntimeModelSelector - ERROR - [identity=server]: shareable data is not a "
    "valid DXO. Received Exception: ValueError"
)
PANIC = (
    "2026-11-26 04:39:06,658 - ServerRunner - ERROR - [identity=server]: Aborting current RUN due to "
    "FATAL_SYSTEM_ERROR received: Round 0"
)
REFUSED = (
    "2026-11-26 04:39:05,000 - Configurator - ERROR - ComponentNotAuthorized: component not authorized: "
    "Component 'nvflare_llm_components.executors.HFSFTExecutor' at config path 'x' is not in allow_list"
)
OTHER = "2026-11-26 04:39:04,000 - Cell - ERROR - [identity=a]: cannot reach the server"
OURS = (
    "2026-11-26 04:39:07,000 - SafetensorsModelPersistor - ERROR - CheckpointError: model: expected "
    "safetensors in /m, found none"
)


@pytest.fixture
def cause(tmp_path: Path):
    def find(**logs: list[str]) -> str | None:
        for who, lines in logs.items():
            (tmp_path / who).write_text("\n".join(lines) + "\n")
        return cause_of({who: tmp_path / who for who in logs})

    return find


def test_a_sites_reason_outranks_what_follows_from_it_and_what_came_before(cause):
    found = cause(server=[SELECTOR, TASK, "Traceback (most recent call last):", PANIC], a=[OTHER])
    assert found == "site b: train_data: 'b.jsonl': expected columns input and output"


def test_sites_that_share_a_cause_share_the_line(cause):
    other = TASK.replace("site 'b'", "site 'a'")
    assert (cause(server=[TASK, other]) or "").startswith("sites a, b: train_data:")


def test_what_a_library_said_is_read_in_the_sites_own_log(cause):
    hidden = TASK.replace(
        ROWS,
        "Task 'train' failed at site 'b': ImportError at nvflare_llm_components/x.py:1; "
        "the text is in this site's own log.txt",
    )
    own = [
        "2026-11-26 04:39:06,000 - HFSFTExecutor - WARNING - Task 'train' failed:",
        '  File "x.py", line 1',
        "KeyError: 'flash'",
        "which led to:",
        "ImportError: FlashAttention2 is not installed",
        "2026-11-26 04:39:06,100 - ClientRunner - ERROR - gone",
    ]
    assert cause(server=[hidden], b=own) == "site b: ImportError: FlashAttention2 is not installed"
    assert (cause(server=[hidden]) or "").startswith(
        "site b: Task 'train' failed at site 'b': ImportError at"
    )


def test_a_refused_class_is_told_with_the_command_that_allows_it(cause):
    assert cause(server=[REFUSED]) == (
        "server: nvflare_llm_components.executors.HFSFTExecutor is not allowed. "
        "Type: nvflare-llm allow WORKSPACE"
    )
    torch = REFUSED.replace("nvflare_llm_components.executors.HFSFTExecutor", "torch.optim.SGD")
    assert (cause(server=[torch]) or "").endswith("--also torch.optim.SGD")


def test_our_own_sentence_outranks_an_earlier_one_of_flare(cause):
    assert "expected safetensors" in (cause(server=[OURS], a=[OTHER]) or "")


def test_where_there_is_nothing_else_flares_first_error_is_told(cause):
    assert cause(a=[OTHER], server=[PANIC]) == "a: cannot reach the server"


def test_no_error_is_no_cause(cause, tmp_path):
    assert cause(server=["2026-11-26 04:39:04,000 - Cell - INFO - all is well"]) is None
    assert cause_of({"server": tmp_path / "missing"}) is None


@given(st.text())
@settings(deadline=None)
def test_whatever_stands_in_a_log_the_cause_is_one_printable_line(tmp_path_factory, text):
    log = tmp_path_factory.mktemp("logs") / "log.txt"
    log.write_text(f"2026-11-26 04:39:04,000 - x - ERROR - {text}\n", encoding="utf-8", errors="replace")
    found = cause_of({"a": log})
    assert found is None or found.isprintable()
