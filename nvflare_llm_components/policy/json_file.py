"""JSON that came from outside: bounded, and an object; and that a job is made of nothing else."""

import json
from pathlib import Path
from typing import Any

from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.tensors.text import printable

MAX_BYTES = 2**26
_CONFIGURATION = "config_fed_"


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


def check_json_alone(app: Path) -> None:
    """Check that FLARE reads no configuration of a job that is anything but JSON.

    HOCON's ``include`` puts any file and any URL that the site can read into a job's arguments; FLARE looks
    for such a configuration in every folder of the app.

    Args:
        app: the job's, at this site or server.

    Raises:
        PolicyError: naming the file; nothing of it.
    """
    for path in sorted(app.rglob(f"{_CONFIGURATION}*")):
        if path.suffix != ".json":
            raise PolicyError(
                f"The job's configuration: expected a job of JSON alone, found {printable(path.name, 80)}. "
                "Such a file could include any file of this site. Write it as JSON."
            )
