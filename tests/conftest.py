"""A site's executor on a tiny model. The simulator tests have models and data of their own."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.workspace import Workspace

from nvflare_llm_components.executors import HFSFTExecutor
from tests.tasks import NUM_ROWS, SFT
from tests.tiny import save_tiny_model, write_rows


@pytest.fixture(autouse=True)
def _places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site of the tests lets jobs use what the tests have made, and nothing else."""
    for name in ("NVFLARE_LLM_MODEL", "NVFLARE_LLM_DATA"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp()))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Sums have the bits of their number of threads: what a test changes stays its own."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, object]] = [{"input": f"{n}?", "output": str(n)} for n in range(NUM_ROWS)]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture
def fl_ctx(tmp_path: Path) -> FLContext:
    (tmp_path / "startup").mkdir()
    (tmp_path / "local").mkdir()
    context = FLContext()
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, Workspace(str(tmp_path), "site-1"), private=True)
    context.set_prop(ReservedKey.RUN_NUM, "job", private=False)
    context.set_prop(ReservedKey.IDENTITY_NAME, "site-1", private=False)
    return context


@pytest.fixture
def named_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model, as the one that the site's environment names: it may be sent out as it is."""
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(model))
    return model


@pytest.fixture
def make(model: Path, data: Path, fl_ctx: FLContext):
    made = []

    def build(**changes: Any) -> HFSFTExecutor:
        arguments = {
            "model_name_or_path": str(model),
            "train_data": str(data),
            "eval_data": str(data),
            "sft_config": SFT,
        }
        executor = HFSFTExecutor(**(arguments | changes))
        made.append(executor)
        return executor

    yield build
    for executor in made:
        executor.handle_event(EventType.END_RUN, fl_ctx)
    assert "nvflare-llm-training" not in [thread.name for thread in threading.enumerate()]
