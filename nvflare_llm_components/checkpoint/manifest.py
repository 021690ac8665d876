"""federation.json: where a saved model comes from, and what its files must hash to."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare_llm_components.tensors.atomic import replace_text
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.text import printable

MANIFEST_FILE = "federation.json"
FORMAT_VERSION = 1
CHUNK_BYTES = 16 * 2**20


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's record; empty where this package did not save it.

    Raises:
        CheckpointError: if the record is unreadable or of a version that this release does not know.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        found = printable(error, 200)
        raise CheckpointError(f"{path}: expected JSON, found {found}. Copy the folder again.") from error
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {record.get('format_version')}. "
            "Use the release of nvflare-llm-components that saved it, or a later one."
        )
    return record


def write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Write or replace a folder's record in one step; its other links keep the old one."""
    text = json.dumps({"format_version": FORMAT_VERSION, **record}, indent=2, sort_keys=True)
    replace_text(folder / MANIFEST_FILE, text + "\n")


def verify_files(folder: Path) -> None:
    """Compare a folder's files with the checksums of its record, where it has one.

    Raises:
        CheckpointError: naming the files that are missing or changed.
    """
    expected = _digests(folder)
    changed = [
        name
        for name, digest in expected.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]
    if changed:
        raise CheckpointError(
            f"{folder}: expected the files that {MANIFEST_FILE} lists, found {sorted(changed)} "
            "missing or changed. "
            f"Copy the folder again; where the change is wanted, delete {MANIFEST_FILE}."
        )


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 by file name. A record may come with a model from elsewhere: a path in it opens nothing."""
    found = read_manifest(folder).get("sha256", {})
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{folder / MANIFEST_FILE}: expected sha256 by file name, found another structure."
        )
    for name in found:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(
                f"{folder / MANIFEST_FILE}: expected names of files beside it, found the path "
                f"'{printable(name, 80)}'. Copy the folder again, from who made it."
            )
    return found


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
