"""Finds and reads what a run left: the records of its sites."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare_llm_components.tensors.text import printable

Record = dict[str, Any]

_WHOLE = (
    *("round", "num_rounds", "step", "num_steps", "start_step", "end_step"),
    *("num_examples", "num_tokens", "missed_rounds"),
    *("bytes_out", "bytes_in", "bytes_before", "bytes_after", "num_saturated", "num_nonfinite"),
)
_REAL = (
    *("seconds", "train_seconds", "task_seconds", "epoch", "learning_rate", "relative_error"),
    *("loss", "eval_loss", "train_loss"),
)
_WORDS = ["kind", "operation", "task", "direction", "site", "peer"]
_NEEDED = {"train": ("step",), "eval": ("step",), "round": ("round", "start_step", "end_step")}
_LARGEST = 2**50  # of a count, and of a real number: what a figure can hold


ROUNDS, METRICS, FINAL = "rounds.jsonl", "metrics.jsonl", "final_evaluation.json"
_DEPTH = 6  # of a POC workspace: example_project/prod_00/site-1/<job>/metrics.jsonl


@dataclass(frozen=True)
class SiteRun:
    """One site's part of a run, or a baseline.

    Attributes:
        label: for people; unique among the runs found together.
        folder: holds ``metrics.jsonl``, and ``traffic.jsonl`` where messages went through the filters.
        site: the site's name; that of the folder for a baseline.
    """

    label: str
    folder: Path
    site: str = ""

    @property
    def unit(self) -> str:
        """What ``step`` counts in the records."""
        return "optimizer step"

    def metrics(self, kind: str) -> list[Record]:
        """Records of one kind (``train``, ``eval`` or ``round``), in the order they were written."""
        records = of_kind(read_lines(self.folder / METRICS), kind)
        return having(records, *_NEEDED[kind])

    def message_bytes(self) -> int | None:
        """Size in bytes of the last training result this site sent, or None if none was recorded."""
        sent = [
            record["bytes_after"]
            for record in having(
                read_lines(self.folder / "traffic.jsonl"), "operation", "task", "bytes_after"
            )
            if record["operation"] == "quantize" and record["task"] == "train"
        ]
        return sent[-1] if sent else None


@dataclass(frozen=True)
class ToldRun(SiteRun):
    """What a server was told of a site, round by round; ``folder`` is the server's run directory."""

    @property
    def unit(self) -> str:
        """What ``step`` counts in the records."""
        return "rounds done"

    def metrics(self, kind: str) -> list[Record]:
        """Records as of a site whose rounds have one step each."""
        found: list[Record] = []
        for record in having(read_lines(self.folder / ROUNDS), "round", "sites"):
            number, own = record["round"], record["sites"].get(self.site)
            if own is None:
                continue
            found.append({"kind": "round", "round": number, "start_step": number, "end_step": number + 1})
            found += [{"kind": "eval", "step": number, **each} for each in having([own], "eval_loss")]
            found += [
                {"kind": "train", "step": number + 1, "loss": each["train_loss"]}
                for each in having([own], "train_loss")
            ]
        last = final_evaluation(self.folder / FINAL)
        if "round" in last and self.site in last["sites"]:
            found.append({"kind": "eval", "step": last["round"] + 1, "eval_loss": last["sites"][self.site]})
        return of_kind(found, kind)

    def message_bytes(self) -> int | None:
        """None: the server's ledger has all sites' messages, see ``traffic``."""
        return None


def find_runs(path: Path) -> list[SiteRun]:
    """Finds the runs below a folder, of several jobs those of the latest.

    Args:
        path: a folder with ``metrics.jsonl`` (a baseline, a site's run directory), a simulator workspace, a
            folder of startup kits, or a server's run directory, also as ``nvflare job download`` fetched it.

    Returns:
        One entry for each site, by name.

    Raises:
        ValueError: there is none.
    """
    if (path / METRICS).is_file():
        name = printable(path.resolve().name, 200)
        return [SiteRun(name, path, name)]
    files = sorted(path.glob(f"*/simulate_job/{METRICS}")) or latest_files(path, METRICS)
    if files and len({file.parents[1].name for file in files}) == len(files):
        named = [(printable(file.parents[1].name, 200), file.parent) for file in files]
        return [SiteRun(_label(path, site), folder, site) for site, folder in named]
    told = [] if files else latest_files(path, ROUNDS)
    if len(told) != 1:
        found = "several" if files or told else "none"
        raise ValueError(
            f"{path}: expected {METRICS} or {ROUNDS} of one run: a baseline, a workspace of the simulator, "
            f"startup kits, a run directory, or a downloaded job. Found {found}."
        )
    records = having(read_lines(told[0]), "round", "sites")
    sites = sorted({site for record in records for site in record["sites"]})
    return [ToldRun(_label(path, site), told[0].parent, site) for site in sites]


def _label(path: Path, site: str) -> str:
    return f"{printable(path.resolve().name, 200)} {site}"


def latest_files(folder: Path, name: str, since: float = 0.0) -> list[Path]:
    """Files of a name at most some folders down; of several jobs, those of the latest.

    Args:
        folder: where to look.
        name: of the files.
        since: seconds since 1970; what was written before is left out.
    """
    try:
        found = [file for depth in range(_DEPTH) for file in folder.glob("*/" * depth + name)]
    except OSError:  # the simulator is removing an earlier run's folders
        found = []
    written = {file: at for file in found if (at := _written(file)) and at >= since}
    latest = max(written, key=lambda file: written[file], default=None)
    return sorted(file for file in written if latest and file.parent.name == latest.parent.name)


def _written(file: Path) -> float:
    """When a file was last written; 0 for one that the simulator has just removed."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def final_evaluation(file: Path) -> Record:
    """A final evaluation as far as it is one: ``eval_loss``, and by site in ``sites``."""
    try:
        content = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {"sites": {}}
    sites = content.get("sites") if isinstance(content, dict) else None
    found = sites.items() if isinstance(sites, dict) else ()
    losses = {printable(site, 200): plain({"loss": loss}).get("loss") for site, loss in found}
    return plain(content) | {"sites": {site: loss for site, loss in losses.items() if loss is not None}}


def read_lines(file: Path) -> list[Record]:
    """Records of a JSON-lines file that may still be written, and may come from elsewhere.

    Args:
        file: the file; one that is missing has no records yet.

    Returns:
        Its records as :func:`plain` leaves them. A line that is not finished, or no record, is left out.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [record for line in lines if line.endswith("\n") and (record := _parsed(line))]


def _parsed(line: str) -> Record:
    try:
        return plain(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def plain(content: object) -> Record:
    """What is known of a record: numbers of the right kind, words and names that print; the rest is left out.

    A terminal obeys what is written to it, and a run's folder may be anybody's.
    """
    if not isinstance(content, dict):
        return {}
    found = _numbers(content)
    found |= {key: printable(content[key], 200) for key in _WORDS if isinstance(content.get(key), str)}
    missing, sites = content.get("missing"), content.get("sites")
    if isinstance(missing, list):
        found["missing"] = [printable(site, 200) for site in missing]
    if isinstance(sites, dict):
        found["sites"] = {
            printable(site, 200): _numbers(own) for site, own in sites.items() if isinstance(own, dict)
        }
    return found


def _numbers(content: Record) -> Record:
    return {key: content[key] for key in _WHOLE if _is_whole(content.get(key))} | {
        key: content[key] for key in _REAL if _is_real(content.get(key))
    }


def _is_whole(value: object) -> bool:
    return type(value) is int and abs(value) < _LARGEST


def _is_real(value: object) -> bool:
    # What diverged is no number, and is told; what is out of all reason is left out.
    return (type(value) is float and not _LARGEST <= abs(value) < math.inf) or _is_whole(value)


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """Records of one kind."""
    return [record for record in records if record.get("kind") == kind]


def having(records: Iterable[Record], *keys: str) -> list[Record]:
    """Records that have all of some keys."""
    return [record for record in records if record.keys() >= set(keys)]
