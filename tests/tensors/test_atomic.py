import errno
import os
import shutil
from pathlib import Path

import pytest

from nvflare_llm_components.tensors import atomic
from nvflare_llm_components.tensors.atomic import recover_folder, replace_folder


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "weights").write_text(text)

    return write


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, monkeypatch, can_exchange: bool):
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    for text in ("first", "second", "third"):
        replace_folder(tmp_path / "last", writer(text))
        assert (tmp_path / "last/weights").read_text() == text
    assert names(tmp_path) == {"last"}


def test_the_exchange_is_one_step_here(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == ({"b"}, {"a"})


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_folder(tmp_path: Path, failure: BaseException):
    replace_folder(tmp_path / "last", writer("good"))

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise failure

    with pytest.raises(type(failure)):
        replace_folder(tmp_path / "last", fail)
    assert (tmp_path / "last/weights").read_text() == "good"
    assert names(tmp_path) == {"last"}


def test_what_a_kill_left_is_cleared_by_the_next_write(tmp_path: Path):
    (tmp_path / ".last.writing").mkdir()
    (tmp_path / ".last.writing/half").touch()
    replace_folder(tmp_path / "last", writer("good"))
    assert names(tmp_path / "last") == {"weights"}


def test_a_folder_renamed_by_a_kill_comes_back(tmp_path: Path):
    replace_folder(tmp_path / ".last.previous", writer("good"))
    recover_folder(tmp_path / "last")
    assert (tmp_path / "last/weights").read_text() == "good"
    assert names(tmp_path) == {"last"}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EPERM])
def test_a_folder_that_cannot_be_synced_is_replaced(tmp_path: Path, monkeypatch, code: int):
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    replace_folder(tmp_path / "last", writer("good"))
    assert (tmp_path / "last/weights").read_text() == "good"


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_file_that_cannot_be_synced_is_an_error(tmp_path: Path, monkeypatch, code: int):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO if Path(f"/proc/self/fd/{descriptor}").is_dir() else code, "refused")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="refused"):
        replace_folder(tmp_path / "last", writer("good"))


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_scratch_folder_that_cannot_be_removed_is_passed_over(tmp_path: Path, monkeypatch, can_exchange):
    """As on NFS, where a file that is still mapped stays under another name."""
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)

    def rename_away(path: Path, ignore_errors: bool = False) -> None:
        for file in Path(path).glob("[!.]*") if Path(path).is_dir() else ():
            file.rename(file.with_name(".nfs0001"))

    monkeypatch.setattr(shutil, "rmtree", rename_away)
    for text in ("first", "second", "third"):
        replace_folder(tmp_path / "last", writer(text))
        assert names(tmp_path / "last") == {"weights"}
        assert (tmp_path / "last/weights").read_text() == text
    shutil.rmtree(tmp_path / "last")
    (tmp_path / "last").rename(tmp_path / "away")
    recover_folder(tmp_path / "last")
    assert not (tmp_path / "last").exists(), "leftovers of NFS are no model"


def test_a_symlink_in_the_place_of_the_scratch_folder_is_not_followed(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").touch()
    (tmp_path / ".last.writing").symlink_to(tmp_path / "elsewhere")
    replace_folder(tmp_path / "last", writer("good"))
    assert (tmp_path / "last/weights").read_text() == "good"
    assert names(tmp_path / "elsewhere") == {"kept"}
