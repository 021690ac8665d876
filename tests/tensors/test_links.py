import os
from pathlib import Path

import pytest

from nvflare_llm_components.tensors.links import link_or_copy, link_tree, links_in


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "run/state").mkdir(parents=True)
    (tmp_path / "run/state/weights").write_text("1")
    (tmp_path / "run/left_out").mkdir()
    (tmp_path / "run/left_out/file").touch()
    return tmp_path / "run"


def test_a_linked_folder_outlives_the_first_and_takes_no_second_room(source: Path, tmp_path: Path):
    link_tree(source, tmp_path / "kept", "left_out")
    kept = tmp_path / "kept/state/weights"
    assert kept.samefile(source / "state/weights")
    (source / "state/weights").unlink()
    assert kept.read_text() == "1"
    assert not (tmp_path / "kept/left_out").exists()


def test_symbolic_links_are_left_out(source: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("not of this run")
    (source / "state/link").symlink_to(tmp_path / "secret")
    (source / "folder").symlink_to(tmp_path)
    link_tree(source, tmp_path / "kept")
    assert not (tmp_path / "kept/state/link").exists()
    assert not (tmp_path / "kept/folder").exists()


def test_a_file_system_without_links_gets_a_copy(source: Path, tmp_path: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source / "state/weights", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "1"
    assert not (tmp_path / "copy").samefile(source / "state/weights")


def test_links_are_found_at_every_depth_and_not_followed(tmp_path: Path):
    (tmp_path / "run/deep").mkdir(parents=True)
    (tmp_path / "run/deep/up").symlink_to(tmp_path)
    (tmp_path / "run/gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "run/deep/file").touch()
    assert links_in(tmp_path / "run") == [tmp_path / "run/deep/up", tmp_path / "run/gone"]
    assert links_in(tmp_path / "run/gone") == [tmp_path / "run/gone"]
    assert links_in(tmp_path / "missing") == []
