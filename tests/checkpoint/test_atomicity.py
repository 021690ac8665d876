"""What is on disk when saving is cut short: by kill -9 at any moment, or by a disk that is full."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nvflare_llm_components.checkpoint.manifest import read_manifest, verify_files
from nvflare_llm_components.checkpoint.model_folder import save_model_folder
from nvflare_llm_components.checkpoint.weight_files import map_weights

NUM_KILLS = 3
SAVE_FOR_EVER = """
import itertools, sys, torch
from pathlib import Path
from nvflare_llm_components.checkpoint.model_folder import save_model_folder
folder = Path(sys.argv[1])
for number in itertools.count():
    weights = {f"w{i}": torch.full((50_000,), float(number)) for i in range(20)}
    save_model_folder(folder / "last", weights, {"config.json": b"{}"}, {"round": number}, 1_000_000)
    print(number, flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_complete_model(tmp_path: Path):
    draw = random.Random(0)
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        reported = [0, *map(int, process.stdout.read().split())][-1]
        process.wait()
        process.stdout.close()
        verify_files(tmp_path / "last")
        number = read_manifest(tmp_path / "last")["round"]
        assert number >= reported
        weights = map_weights(tmp_path / "last")
        assert len(weights) == 20
        assert all(torch.equal(value, torch.full((50_000,), float(number))) for value in weights.values())


@pytest.fixture
def small_files_only():
    """Let no file of this process grow beyond 100 kB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_good_model_and_no_litter(tmp_path: Path, small_files_only):
    small, large = {"a": torch.ones(10)}, {"a": torch.zeros(50_000)}
    save_model_folder(tmp_path / "last", small, {}, {"round": 0})
    with pytest.raises(OSError, match="too large"):
        save_model_folder(tmp_path / "last", large, {}, {"round": 1})
    verify_files(tmp_path / "last")
    assert read_manifest(tmp_path / "last")["round"] == 0
    assert os.listdir(tmp_path) == ["last"]  # noqa: PTH208 - hidden files as well
