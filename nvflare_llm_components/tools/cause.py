"""Why a run failed: the one line, among the logs of all its processes, that the others follow from."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvflare_llm_components.tensors.text import printable

LOG = "log.txt"
_RECORD = re.compile(r"^(?P<time>\d{4}-\d\d-\d\d [\d:,]+) - .*?(?P<level>ERROR|CRITICAL) - (?P<text>.*)$")
_TASK = re.compile(
    r"Task '(?P<task>\w+)' failed at site '(?P<site>[^']+)': (?P<kind>\w+)"
    r"(: (?P<what>.*)| at [^;]+; the text is in)"
)
_NEW_RECORD = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ - ")
_REFUSED = re.compile(r"Component '(?P<path>[\w.]+)'.* is not in allow_list")
_IDENTITY = re.compile(r"^\[[^\]]*\]:? ?")
# What FLARE says after somebody else has failed.
_FOLLOWS = re.compile(
    r"shareable data is not a valid DXO|Simulator run error|Could not start the Server App|Aborting|"
    r"aborting|server_runner|Execution Exception in|job_runner|Traceback|exception while|Abort signal"
)


@dataclass(frozen=True)
class _Error:
    """An error's first line, and whose log it stands in."""

    who: str
    time: str
    text: str

    @property
    def rank(self) -> int:
        """How near to the cause: a site's own reason, a refusal, a sentence of ours, FLARE's, a follower."""
        if _TASK.search(self.text):
            return 0
        if _REFUSED.search(self.text):
            return 1
        if _FOLLOWS.search(self.text):
            return 4
        return 2 if "expected" in self.text.lower() and "found" in self.text.lower() else 3


def cause_of(logs: dict[str, Path]) -> str | None:
    """The cause in one line; None where no log has an error.

    Args:
        logs: log files by who wrote them: ``server``, sites, ``simulator``.
    """
    errors = [each for who, log in logs.items() for each in _errors(who, log)]
    if not errors:
        return None
    first = min(errors, key=lambda each: (each.rank, each.time))
    if task := _TASK.search(first.text):
        told = [
            found for each in errors if (found := _TASK.search(each.text)) and found["kind"] == task["kind"]
        ]
        sites = sorted({found["site"] for found in told if found["what"] == task["what"]})
        what = task["what"] or _own_words(logs.get(task["site"]), task["task"]) or first.text
        return printable(f"site{'s' * (len(sites) > 1)} {', '.join(sites)}: {what}", 600)
    if refused := _REFUSED.search(first.text):
        also = "" if refused["path"].startswith("nvflare_llm_components.") else f" --also {refused['path']}"
        return f"{first.who}: {refused['path']} is not allowed. Type: nvflare-llm allow WORKSPACE{also}"
    return printable(f"{first.who}: {first.text}", 600)


def _own_words(log: Path | None, task: str) -> str | None:
    """What a library said at a site: it may quote data, so that it stands in the site's own log alone."""
    if log is None or not log.is_file():
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((n for n, line in enumerate(lines) if line.endswith(f"Task '{task}' failed:")), len(lines))
    block: list[str] = []
    for line in lines[start + 1 :]:
        if _NEW_RECORD.match(line):
            break
        block.append(line)
    return next((line for line in reversed(block) if re.match(r"\w+: ", line)), None)


def logs_of(workspace: Path, sites: Sequence[str]) -> dict[str, Path]:
    """The logs that a simulated run leaves, by who wrote them."""
    return {who: workspace / who / LOG for who in ("server", *sites)}


def _errors(who: str, log: Path) -> Iterator[_Error]:
    if not log.is_file():
        return
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if record := _RECORD.match(line):
            yield _Error(who, record["time"], _IDENTITY.sub("", record["text"]))
