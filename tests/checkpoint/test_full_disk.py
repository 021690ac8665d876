"""A global model that the disk has no room for: what is there stays, and the next one is saved."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nvflare_llm_components.checkpoint.global_models import GlobalModels
from nvflare_llm_components.checkpoint.initial_model import InitialModel, load_initial_model
from nvflare_llm_components.checkpoint.manifest import read_manifest, verify_files
from nvflare_llm_components.checkpoint.weight_files import map_weights
from nvflare_llm_components.tensors.errors import CheckpointError
from tests.tiny import save_tiny_model

ROOM_BYTES = 60_000  # for the small files of a model folder, not for its weights
Full = Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """Let no file of this process grow further, wherever the test may run."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Fill a disk of its own with another file."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(folder).free - ROOM_BYTES))
    yield
    ballast.unlink()


@pytest.fixture(params=["file size limit", "full disk"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Full]]:
    """A folder, and a context in which it has no room."""
    if request.param == "file size limit":
        yield tmp_path, small_files_only
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk can't be mounted here: needs root, and a container that lets it")
    yield tmp_path, lambda: filled(tmp_path)
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> InitialModel:
    return load_initial_model(str(save_tiny_model(tmp_path_factory.mktemp("source"))), None, 0)


def record(number: int) -> dict[str, object]:
    return {"round": number, "job_id": "job", "metrics": {}, "parents": {}}


def weights_of(start: InitialModel, number: int) -> dict[str, torch.Tensor]:
    return {name: value + number for name, value in start.weights.items()}


def assert_whole(folder: Path, start: InitialModel, number: int) -> None:
    verify_files(folder)
    assert read_manifest(folder)["round"] == number
    expected = weights_of(start, number)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in map_weights(folder).items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
        assert torch.equal(opened.get_parameter(name), value), name


def files_of(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
def test_a_full_disk_costs_only_the_model_that_did_not_fit(
    disk: tuple[Path, Full], start: InitialModel, save_dtype
):
    folder, full = disk
    root = folder / "global_model"
    models = GlobalModels(root, start, save_dtype=save_dtype)
    models.save_last(weights_of(start, 0), record(0))
    before = files_of(root)
    with full(), pytest.raises(CheckpointError, match=r"round 1 could not be saved as .*: \[Errno") as caught:
        models.save_last(weights_of(start, 1), record(1))
    assert "MB are free" in str(caught.value)
    assert files_of(root) == before
    for name in {Path(path).parent.name for path in before if path.endswith(".safetensors")}:
        assert_whole(root / name, start, 0)
    models.save_last(weights_of(start, 2), record(2))
    assert_whole(root / "last", start, 2)
    assert len(files_of(root)) == len(before)
