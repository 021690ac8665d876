"""Nothing is lost where FLARE ends a site's process after each task."""

from pathlib import Path

import pytest
import torch

from tests.integration.simulator import NUM_ROUNDS, SITES, Run, assert_completed, run_job

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
