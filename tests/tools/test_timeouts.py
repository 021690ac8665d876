import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_llm_components.tools.timeouts import LIMITS, MARGIN, limits_of, seconds_of, verdicts

JOBS = Path(__file__).parents[2] / "job_configs"


def test_the_line_that_lost_runs_elsewhere_is_slow_enough_for_ours():
    """758 MB at 10 Mbit/s: FLARE's default of 300 s is too short, what the shipped jobs set is not."""
    assert verdicts(758_000_000, 10, limits_of(None)) == []
    (first,) = verdicts(758_000_000, 10, dict.fromkeys(LIMITS, 300.0))
    assert first == (
        "submit_task_result_timeout: this message takes 10.1 min at 10 Mbit/s; the timeout is 5.0 min. "
        "Set it to 780 s or more, or choose a lower precision."
    )


@pytest.mark.parametrize("job", sorted(folder.name for folder in JOBS.iterdir() if folder.is_dir()))
def test_the_shipped_jobs_set_what_is_told_of_them(job: str):
    assert limits_of(JOBS / job) == limits_of(None)


def test_a_job_that_sets_nothing_has_flares_default(tmp_path: Path):
    file = tmp_path / "app/config/config_fed_client.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"get_task_timeout": 900}))
    assert limits_of(tmp_path) == {"submit_task_result_timeout": 300.0}
    file.write_text(json.dumps({"submit_task_result_timeout": 900}))
    assert limits_of(tmp_path) == {"submit_task_result_timeout": 900.0}


def test_what_is_no_job_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a job"):
        limits_of(tmp_path / "nowhere")


@given(st.integers(1, 10**12), st.floats(0.1, 1e5), st.floats(1, 1e6))
def test_what_is_asked_for_is_enough(size: int, mbps: float, limit: float):
    told = verdicts(size, mbps, {"t": limit})
    assert bool(told) == (seconds_of(size, mbps) * MARGIN > limit)
    if told:
        asked = float(told[0].partition("Set it to ")[2].split()[0])
        assert verdicts(size, mbps, {"t": asked}) == []
