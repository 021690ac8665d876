import json
from pathlib import Path

import pytest

from nvflare_llm_components.checkpoint.manifest import read_manifest, sha256, verify_files, write_manifest
from nvflare_llm_components.tensors.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").write_text("a")
    write_manifest(tmp_path, {"round": 1, "sha256": {"a": sha256(tmp_path / "a")}})
    return tmp_path


def test_what_is_written_is_read(folder: Path):
    assert read_manifest(folder)["round"] == 1
    verify_files(folder)


@pytest.mark.parametrize("change", [lambda path: path.write_text("b"), lambda path: path.unlink()])
def test_a_changed_or_missing_file_is_named(folder: Path, change):
    change(folder / "a")
    with pytest.raises(CheckpointError, match=r"found \['a'\] missing or changed"):
        verify_files(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors", "..", "", "a/b"])
def test_a_record_names_no_file_elsewhere(folder: Path, name: str):
    """A model's folder may come from a job: what it names is hashed, and a difference is told."""
    write_manifest(folder, {"sha256": {name: "0" * 64}})
    with pytest.raises(CheckpointError, match="expected names of files beside it, found the path"):
        verify_files(folder)


@pytest.mark.parametrize("digests", [["a"], "a", 1])
def test_a_record_of_another_structure_is_named(folder: Path, digests: object):
    write_manifest(folder, {"sha256": digests})
    with pytest.raises(CheckpointError, match="expected sha256 by file name"):
        verify_files(folder)


def test_a_folder_without_a_record_is_taken_as_it_is(tmp_path: Path):
    assert read_manifest(tmp_path) == {}
    verify_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        (json.dumps({"format_version": 9}), "expected format_version 1, found 9"),
    ],
)
def test_an_unreadable_record_is_named(folder: Path, text: str, sentence: str):
    (folder / "federation.json").write_text(text)
    with pytest.raises(CheckpointError, match=sentence):
        read_manifest(folder)
