"""Results wait on the job's own disk: FLARE's own consumer, cell context and lazy references."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nvflare.app_common.utils.tensor_disk_offload_context import (
    cleanup_tensor_disk_offload,
    setup_tensor_disk_offload,
)
from nvflare.fuel.f3.cellnet.core_cell import CoreCell

from nvflare_llm_components.flare import waiting
from nvflare_llm_components.flare.waiting import FOLDER, close_room, is_in_memory, open_room

MODEL = {"w": torch.ones(10), "half": torch.ones(5, dtype=torch.bfloat16), "n": "no tensor"}


class Cell:
    """FLARE's cell, as far as the offload is concerned: it keeps a context."""

    def __init__(self) -> None:
        self.context: dict[str, object] = {}

    def get_fobs_context(self) -> dict[str, object]:
        return dict(self.context)

    def update_fobs_context(self, changes: dict[str, object]) -> None:
        self.context.update(changes)


@pytest.fixture
def engine() -> SimpleNamespace:
    return SimpleNamespace(run_manager=SimpleNamespace(cell=Cell()))


def test_results_wait_in_the_run_directory_until_flare_ends_its_offload(engine, tmp_path: Path):
    context = setup_tensor_disk_offload(engine, enabled=True)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "left by a kill").write_text("")
    open_room(tmp_path, engine, MODEL, 3)
    assert engine.run_manager.cell.context == {
        "enable_tensor_disk_offload": True,
        "tensor_disk_offload_root_dir": str(tmp_path / FOLDER),
    }
    assert not list((tmp_path / FOLDER).iterdir())
    cleanup_tensor_disk_offload(engine, context)
    close_room(tmp_path)
    assert engine.run_manager.cell.context["enable_tensor_disk_offload"] is False
    assert not (tmp_path / FOLDER).exists()


def test_results_wait_there_in_the_simulator_too_whose_job_has_a_line_of_its_own(
    engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    line = Cell()
    monkeypatch.setitem(CoreCell.ALL_CELLS, f"server.{tmp_path.name}", line)
    setup_tensor_disk_offload(engine, enabled=True)
    open_room(tmp_path, engine, MODEL, 3)
    assert line.context == engine.run_manager.cell.context
    close_room(tmp_path)
    assert line.context["enable_tensor_disk_offload"] is False


def test_a_disk_without_room_is_not_filled(engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FLARE's server ends when a result cannot be written."""
    setup_tensor_disk_offload(engine, enabled=True)
    monkeypatch.setattr(waiting.shutil, "disk_usage", lambda path: SimpleNamespace(free=179))
    assert "180" not in open_room(tmp_path, engine, MODEL, 2)
    assert engine.run_manager.cell.context["enable_tensor_disk_offload"] is True
    assert "in memory" in open_room(tmp_path, engine, MODEL, 3)  # 4 * 3 * 15 bytes
    assert engine.run_manager.cell.context["enable_tensor_disk_offload"] is False


def test_without_a_line_there_is_nothing_to_set(tmp_path: Path):
    assert open_room(tmp_path, SimpleNamespace(run_manager=None, get_cell=lambda: None), MODEL, 3) == ""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("/dev/a / ext4 rw 0 0\n", False),
        ("/dev/a / ext4 rw 0 0\ntmpfs {0} tmpfs rw 0 0\n", True),
        ("tmpfs / tmpfs rw 0 0\n/dev/a {0} xfs rw 0 0\n", False),
        ("tmpfs {0}x tmpfs rw 0 0\n", False),
    ],
)
def test_the_innermost_mount_tells_what_a_file_system_is(lines: str, expected: bool, tmp_path: Path):
    mounts = tmp_path / "mounts"
    mounts.write_text(lines.format(tmp_path))
    assert is_in_memory(tmp_path / "run", mounts) is expected
    assert is_in_memory(tmp_path, tmp_path / "none") is False
