"""Nothing is lost where FLARE ends a site's process after each task."""

from pathlib import Path

import pytest
import torch

from tests.integration.simulator import NUM_ROUNDS, SITES, Run, assert_completed, run_job
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


def test_the_ordered_average_gives_the_same_bits_with_fewer_threads(tmp_path: Path, model: Path):
    # Neither weights nor sums are exact here: only a fixed order gives the same bits.
    data = write_site_data(tmp_path / "data", SITES, num_rows=11)
    runs = [
        run_job("sft_exact", tmp_path / f"{threads}", model=model, data=data, threads=threads)
        for threads in (1, 2)
    ]
    for run in runs:
        assert_completed(run, num_rounds=NUM_ROUNDS)
    one, two = (run.weights() for run in runs)
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]
