"""Fixtures of the simulator tests: one tiny model, one data root, one plain run that others compare with."""

from pathlib import Path

import pytest

from tests.integration.simulator import SITES, Run, keep_every_round, run_job
from tests.tiny import save_tiny_model, write_site_data


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A power of two of rows: weighting by it is exact, so that an average of two has no order.
    return write_site_data(tmp_path_factory.mktemp("data"), SITES, num_rows=16)


@pytest.fixture(scope="session")
def sft(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Run:
    """The job ``sft``, with each round's global model kept."""
    return run_job("sft", tmp_path_factory.mktemp("sft"), model=model, data=data, server=keep_every_round)
