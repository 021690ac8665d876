"""federation.json: where a saved model comes from, and what its files must hash to."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare_llm_components.checkpoint.errors import CheckpointError

RECORD_FILE = "federation.json"
FORMAT_VERSION = 1
CHUNK_BYTES = 16 * 2**20


def read_record(folder: Path) -> dict[str, Any]:
    """Return a folder's record; empty where this package did not save it.

    Raises:
        CheckpointError: if the record is unreadable or of a version that this release does not know.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: expected JSON, found {error}. Copy the folder again.") from error
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {record.get('format_version')}. "
            "Use the release of nvflare-llm-components that saved it, or a later one."
        )
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write or replace a folder's record in one step; its other links keep the old one."""
    scratch = folder / f".{RECORD_FILE}.writing"
    scratch.write_text(
        json.dumps({"format_version": FORMAT_VERSION, **record}, indent=2, sort_keys=True) + "\n"
    )
    scratch.replace(folder / RECORD_FILE)


def verify_files(folder: Path) -> None:
    """Compare a folder's files with the checksums of its record, where it has one.

    Raises:
        CheckpointError: naming the files that are missing or changed.
    """
    expected: dict[str, str] = read_record(folder).get("sha256", {})
    changed = [
        name
        for name, digest in expected.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]
    if changed:
        raise CheckpointError(
            f"{folder}: expected the files that {RECORD_FILE} lists, found {sorted(changed)} "
            "missing or changed. "
            f"Copy the folder again; where the change is wanted, delete {RECORD_FILE}."
        )


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
