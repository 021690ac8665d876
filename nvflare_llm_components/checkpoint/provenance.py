"""Where a model comes from: its base, and each round since, in one record that a person can read."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare_llm_components.checkpoint.manifest import read_manifest, sha256

_SNAPSHOT = re.compile(r".*/snapshots/([0-9a-f]{40})")
_OF_A_ROUND = ("round", "job_id", "update_norm", "weights_sha256", "precision", "round_log")


def base_of(name: str | None, folder: Path) -> dict[str, Any]:
    """What a job starts from: its name, its revision where it is a hub's, and the hash of its weights.

    Args:
        name: as the job calls it.
        folder: where it lies.
    """
    record, revision = read_manifest(folder), _SNAPSHOT.fullmatch(str(folder))
    base: dict[str, Any] = {"name": name}
    digests = record.get("sha256") or {file.name: sha256(file) for file in folder.glob("*.safetensors")}
    if digests:
        base["weights_sha256"] = digest_of(digests)
    if revision:
        base["revision"] = revision[1]
    if record:  # of another federation, whose own record begins earlier
        base["federation"] = {key: record.get(key) for key in ("job_id", "round", "base")}
    return base


def digest_of(digests: Mapping[str, str]) -> str:
    """One hash of a folder's weights: what ``sha256sum *.safetensors | sha256sum`` prints there."""
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests) if name.endswith(".safetensors")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def chain_after(
    earlier: Mapping[str, Any], base: Callable[[], Mapping[str, Any]], job_id: str | None
) -> dict[str, Any]:
    """What a model's record says of those before it.

    Args:
        earlier: record of the model before it; empty for the first.
        base: tells what the job started from, where no earlier record does.
        job_id: the job that saves the model: none of the earlier ones.
    """
    rounds = list(earlier.get("rounds", []))
    if "round" in earlier:
        rounds.append({key: earlier[key] for key in _OF_A_ROUND if key in earlier})
    jobs = list(dict.fromkeys(str(entry.get("job_id")) for entry in rounds if entry.get("job_id") != job_id))
    return {"base": earlier.get("base") or dict(base()), "rounds": rounds, "earlier_jobs": jobs}
