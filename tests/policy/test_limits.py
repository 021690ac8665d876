"""What a job may take of a machine."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from nvflare_llm_components.policy import limits
from nvflare_llm_components.policy.limits import (
    check_free_disk,
    check_model_bytes,
    check_processes,
    held_processes,
)
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import Limits, parsed


def test_without_a_policy_there_is_no_limit(tmp_path: Path):
    free = Limits()
    check_model_bytes(2**60, free)
    check_free_disk(tmp_path, free)
    check_processes(64, free)
    assert held_processes(64, free) == 64


def test_a_model_has_a_ceiling():
    ceiling = parsed("[limits]\nmodel_gib = 1.5", "test").limits
    check_model_bytes(3 * 2**29, ceiling)
    with pytest.raises(
        PolicyError, match=r"weights of at most 1.5 GiB once loaded, found '2 GiB'.*sets limits.model_gib in"
    ):
        check_model_bytes(2**31, ceiling)


def test_a_disk_keeps_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ceiling = parsed("[limits]\nfree_disk_gib = 2", "test").limits
    free = [2 * 2**30]
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[0]))
    check_free_disk(tmp_path, ceiling)
    free[0] -= 2**29
    with pytest.raises(PolicyError, match=r"at least 2 GiB free, found '1.5 GiB'.*limits.free_disk_gib"):
        check_free_disk(tmp_path, ceiling)


def test_processes_have_a_ceiling_and_auto_takes_no_more():
    ceiling = parsed("[limits]\nprocesses = 2", "test").limits
    for asked in (1, 2, "auto", None):
        check_processes(asked, ceiling)
    with pytest.raises(PolicyError, match="num_processes: this site's policy expects at most 2, found 3"):
        check_processes(3, ceiling)
    assert [held_processes(found, ceiling) for found in (1, 2, 8)] == [1, 2, 2]


@pytest.mark.parametrize("text", ["model_gib = 0", "model_gib = nan", "free_disk_gib = -1", "processes = 0"])
def test_a_limit_is_a_number_above_nothing(text: str):
    with pytest.raises(PolicyError, match="limits"):
        parsed(f"[limits]\n{text}", "test")
