"""Which update of each site the server took: error feedback carries what was left out of the last of them.

FLARE says that a result was taken when it has been aggregated, by AFTER_CONTRIBUTION_ACCEPT: one that
arrived late, failed or came twice is not. What was taken is on disk, so that a run that continues this one
knows it; the last two rounds of a site are enough, since it may repeat the one in which this run died.
"""

import json
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from nvflare_llm_components.flare.headers import is_server, round_of
from nvflare_llm_components.flare.messages import state_dir_of
from nvflare_llm_components.flare.peers import peer_name_of
from nvflare_llm_components.flare.results import contribution_of
from nvflare_llm_components.tensors.atomic import replace_text

TAKEN_FIELD = "taken_round"
"""Header field of a message to a site: the round of its last update that the server took."""

_TAKEN_FILE = "taken.json"
_BY_SITE = "nvflare_llm_taken_rounds"  # property of the server's FLContext: {site: its last rounds}
_OWN = "nvflare_llm_taken_round"  # property of a site's FLContext: what the server says of it
Taken = dict[str, tuple[int, ...]]


def note_taken(fl_ctx: FLContext) -> None:
    """On the server, when a result was aggregated or refused: remember it if it was aggregated.

    Raises:
        OSError: if the disk does not take it; it is remembered in this process then.
    """
    contribution = contribution_of(fl_ctx)
    number = round_of(fl_ctx.get_prop(AppConstants.TRAINING_RESULT)) if contribution else None
    # Late results are accepted by some workflows; a round that is not the server's is none it can have taken.
    if (
        contribution is None
        or number is None
        or number != fl_ctx.get_prop(AppConstants.CURRENT_ROUND, number)
    ):
        return
    site, taken = contribution[0], _taken(fl_ctx)
    if number in taken.get(site, ()):
        return
    taken = taken | {site: tuple(sorted({*taken.get(site, ()), number})[-2:])}
    fl_ctx.set_prop(_BY_SITE, taken, private=True, sticky=True)
    folder = state_dir_of(fl_ctx)
    if folder is not None:
        folder.mkdir(exist_ok=True)
        replace_text(folder / _TAKEN_FILE, json.dumps(taken))


def taken_round_of_peer(shareable: Shareable, fl_ctx: FLContext) -> int | None:
    """On the server: the round of the last update of the site asking that is in the model it is sent."""
    number, site = round_of(shareable), peer_name_of(fl_ctx)
    if not is_server(fl_ctx) or number is None or site is None:
        return None
    return max((taken for taken in _taken(fl_ctx).get(site, ()) if taken < number), default=None)


def hear_taken(header: dict[str, Any], fl_ctx: FLContext) -> None:
    """On a site: keep what the server says of its last update, for the result of this task."""
    if not is_server(fl_ctx) and TAKEN_FIELD in header:
        fl_ctx.set_prop(_OWN, header[TAKEN_FIELD], private=True, sticky=False)


def taken_round(current_round: int, fl_ctx: FLContext) -> int | None:
    """On a site: the round of its last update that the server took; the last one where it does not say."""
    number: int | None = fl_ctx.get_prop(_OWN, current_round - 1)
    return number


def _taken(fl_ctx: FLContext) -> Taken:
    taken: Taken | None = fl_ctx.get_prop(_BY_SITE)
    if taken is None:
        folder = state_dir_of(fl_ctx)
        taken = _read(folder / _TAKEN_FILE) if folder else {}
        fl_ctx.set_prop(_BY_SITE, taken, private=True, sticky=True)
    return taken


def _read(file: Path) -> Taken:
    """What an earlier process wrote; nothing where the disk has lost it."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        return {str(site): tuple(map(int, rounds)) for site, rounds in read.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
