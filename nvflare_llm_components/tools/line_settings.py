"""What FLARE's streaming needs to hold on slow lines and through cuts: a kit's ``comm_config.json``.

FLARE sends a stream's next 64 MiB before the first of them is acknowledged, sends again what is not
acknowledged within 5 s, and gives up after 60 s of that. A line below 64 MiB / 5 s = 107 Mbit/s is so filled
with copies, and no message larger than that ever arrives. These settings belong to the sender: the server's
kit needs them for the model, a site's for its result.

The file stands at the kit's root, not in ``local``: FLARE takes the first one that it meets below the kit,
jobs' run directories included, and one of them may name a folder of code to load (``comm_driver_path``). At
the root it is always met first.
"""

import json
from pathlib import Path
from typing import Any

from nvflare_llm_components.tensors.atomic import replace_text

FILE = Path("comm_config.json")
_OF_SITE = Path("local", "comm_config.json")
_LONGEST_CUT_S = 900

LINE_SETTINGS: dict[str, int] = {
    "streaming_window_size": 8 * 2**20,
    "streaming_ack_interval": 2 * 2**20,
    "streaming_retry_wait": 60,
    "streaming_retry_timeout": _LONGEST_CUT_S,
    "streaming_ack_progress_timeout": _LONGEST_CUT_S,
    "streaming_ack_wait": _LONGEST_CUT_S,
    "streaming_read_timeout": _LONGEST_CUT_S,
}
"""Bytes and seconds. 8 MiB in 60 s is 1.1 Mbit/s, the slowest line; at 100 ms of latency they carry 670."""


def write_line_settings(kit: Path) -> str | None:
    """Let a kit's streams hold on a slow line; what it has set itself stays.

    Args:
        kit: the folder of a server's or site's startup kit.

    Returns:
        What was done, in a line; None where nothing was missing.

    Raises:
        ValueError: if the file is not what FLARE reads.
    """
    target = kit / FILE
    present = read_object(target)
    wanted = LINE_SETTINGS | read_object(kit / _OF_SITE) | present
    if wanted == present:
        return None
    replace_text(target, json.dumps(wanted, indent=2) + "\n")
    return f"{target}: {len(wanted) - len(present)} settings for slow lines and cuts"


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no file.

    Raises:
        ValueError: it is none.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON. Found {error}. Nothing was changed.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: expected a JSON object. Found {type(content).__name__}. Nothing was changed."
        )
    return content
