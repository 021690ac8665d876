"""Nothing is lost where FLARE ends a site's process after each task."""

from pathlib import Path

import pytest
import torch

from tests.integration.simulator import (
    NUM_ROUNDS,
    SITES,
    Run,
    assert_completed,
    copy_job,
    run_job,
    simulate,
)
from tests.tiny import write_site_data

pytestmark = pytest.mark.integration


def curve(run: Run, site: str) -> list[dict[str, object]]:
    """What the site recorded, without times."""
    return [
        {name: value for name, value in record.items() if name != "time" and "seconds" not in name}
        for record in run.records(site)
    ]


def test_fewer_threads_than_sites_give_the_same_federation(sft: Run, tmp_path: Path, model: Path, data: Path):
    one_thread = run_job("sft", tmp_path, model=model, data=data, threads=1)
    assert_completed(one_thread, num_rounds=NUM_ROUNDS)
    for site in SITES:
        assert curve(one_thread, site) == curve(sft, site)
    # Two summands have no order, and both weights are the same power of two: the average is exact, too.
    for name, value in sft.weights().items():
        assert torch.equal(one_thread.weights()[name], value), name


@pytest.mark.slow
def test_the_ordered_average_gives_the_same_bits_with_fewer_threads(tmp_path: Path, model: Path):
    # Two summands have no order, so three sites; where all train at once, fewer rows are done first.
    num_rows = {"a": 300, "b": 90, "c": 11}
    for site, count in num_rows.items():
        write_site_data(tmp_path / "data", [site], num_rows=count)
    weights = []
    for threads in (1, len(num_rows)):
        folder = tmp_path / str(threads)
        job = copy_job("sft_exact", folder / "job", server={"num_rounds": NUM_ROUNDS})
        options = {"sites": list(num_rows), "model": model, "data": tmp_path / "data", "threads": threads}
        run = simulate(job, folder / "workspace", **options)
        assert_completed(run, num_rounds=NUM_ROUNDS)
        weights.append(run.weights())
    one, all_at_once = weights
    assert one.keys() == all_at_once.keys()
    assert not [name for name in one if not torch.equal(one[name], all_at_once[name])]
