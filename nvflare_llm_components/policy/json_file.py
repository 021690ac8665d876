"""JSON that came from outside: bounded, and an object."""

import json
from pathlib import Path
from typing import Any

from nvflare_llm_components.policy.schema import PolicyError

MAX_BYTES = 2**26


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Args:
        path: the file.
        max_bytes: that it may have.

    Raises:
        PolicyError: it is too large, nested too deeply, or no JSON object.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > max_bytes:
        raise PolicyError(f"{path}: expected at most {max_bytes:,} bytes, found {path.stat().st_size:,}.")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path}: expected JSON, found it unreadable ({type(error).__name__}).") from error
    if not isinstance(found, dict):
        raise PolicyError(f"{path}: expected a JSON object, found {type(found).__name__}.")
    return found
