import json
from pathlib import Path

import pytest

from nvflare_llm_components.checkpoint.errors import CheckpointError
from nvflare_llm_components.checkpoint.record import read_record, sha256, verify_files, write_record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").write_text("a")
    write_record(tmp_path, {"round": 1, "sha256": {"a": sha256(tmp_path / "a")}})
    return tmp_path


def test_what_is_written_is_read(folder: Path):
    assert read_record(folder)["round"] == 1
    verify_files(folder)


@pytest.mark.parametrize("change", [lambda path: path.write_text("b"), lambda path: path.unlink()])
def test_a_changed_or_missing_file_is_named(folder: Path, change):
    change(folder / "a")
    with pytest.raises(CheckpointError, match=r"found \['a'\] missing or changed"):
        verify_files(folder)


def test_a_folder_without_a_record_is_taken_as_it_is(tmp_path: Path):
    assert read_record(tmp_path) == {}
    verify_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "expected JSON"), (json.dumps({"format_version": 9}), "expected format_version 1, found 9")],
)
def test_an_unreadable_record_is_named(folder: Path, text: str, sentence: str):
    (folder / "federation.json").write_text(text)
    with pytest.raises(CheckpointError, match=sentence):
        read_record(folder)
