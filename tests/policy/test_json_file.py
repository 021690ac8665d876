"""JSON from outside: an object, of a size and depth that cost nothing."""

from pathlib import Path

import pytest

from nvflare_llm_components.policy.json_file import MAX_BYTES, read_json
from nvflare_llm_components.policy.schema import PolicyError


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"a":' * 100_000, "\udcff"])
def test_what_is_no_object_is_refused_without_its_content(text: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PolicyError, match=r"config\.json: expected"):
        read_json(path)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: no bytes on disk
    with pytest.raises(PolicyError, match="expected at most"):
        read_json(tmp_path / "config.json")


def test_a_missing_file_is_empty(tmp_path: Path):
    assert read_json(tmp_path / "config.json") == {}
