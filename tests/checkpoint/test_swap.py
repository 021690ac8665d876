from pathlib import Path

import pytest

from nvflare_llm_components.checkpoint import swap
from nvflare_llm_components.checkpoint.swap import recover_folder, replace_folder


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "weights").write_text(text)

    return write


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, monkeypatch, can_exchange: bool):
    if not can_exchange:
        monkeypatch.setattr(swap, "_exchange", lambda one, other: False)
    for text in ("first", "second", "third"):
        replace_folder(tmp_path / "last", writer(text))
        assert (tmp_path / "last/weights").read_text() == text
    assert names(tmp_path) == {"last"}


def test_the_exchange_is_one_step_here(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert swap._exchange(tmp_path / "a", tmp_path / "b")
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
