"""Fixtures of the simulator tests: one tiny model, one data root."""

from pathlib import Path

import pytest

from tests.tiny import save_tiny_model, write_site_data

SITES = ["dolly", "alpaca"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_site_data(tmp_path_factory.mktemp("data"), SITES)
