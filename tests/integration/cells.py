"""A cell of the fault matrix: a job with a quorum, the stage that a site is in, what a run leaves."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.deployment import Poc, records, tell_cell
from tests.integration.simulator import copy_job, executor_args

SITES = ["site-1", "site-2", "site-3"]
VICTIM = SITES[0]
QUORUM = 2
NOTHING = "nothing lost"
QUICK_ENDS = {"NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "20"}
"""FLARE's server waits 15 minutes for a site that does not say how its process has ended."""


def quorum_job(
    folder: Path,
    *,
    rounds: int,
    grace_s: float,
    evaluation_s: int | None = None,
    logging_steps: int = 1,
    **executor: Any,
) -> Path:
    """The job ``sft_int8`` for three sites that goes on with two; `executor` are arguments of that one.

    Args:
        folder: its parent.
        rounds: how many.
        grace_s: for the third site.
        evaluation_s: seconds of the evaluation at the end, which has no quorum; None: as shipped.
        logging_steps: steps between two points of the curves.
    """

    def with_quorum(config: dict[str, Any]) -> None:
        config |= {"num_clients": len(SITES), "num_rounds": rounds, "quorum": QUORUM, "grace_s": grace_s}
        if evaluation_s is not None:
            config["workflows"][1]["args"]["timeout_s"] = evaluation_s

    def with_settings(config: dict[str, Any]) -> None:
        executor_args(config).update(executor)
        executor_args(config)["sft_config"]["logging_steps"] = logging_steps

    return copy_job("sft_int8", folder / "job", server=with_quorum, client=with_settings)


def in_training(poc: Poc, job_id: str, number: int = 1, site: str = VICTIM) -> Callable[[], bool]:
    """Whether a site trains a round."""
    return lambda: any(r["round"] == number for r in records(poc.run_dir(site, job_id), "train"))


def rounds_in(run_dir: Path) -> list[dict[str, Any]]:
    """What the server has told of its rounds so far."""
    file = run_dir / "rounds.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def rounds_of(download: Path) -> list[dict[str, Any]]:
    return rounds_in(download / "workspace")


def errors_of(download: Path) -> str:
    lines = (download / "workspace/log.txt").read_text().splitlines()
    return "\n".join(line[:400] for line in lines if " - ERROR - " in line)


def missing_in(rounds: list[dict[str, Any]]) -> dict[int, list[str]]:
    """The sites whose results a round lacks, by its number as people count."""
    return {r["round"] + 1: r["missing"] for r in rounds if r["missing"]}


def lost_in(rounds: list[dict[str, Any]]) -> str:
    """What the average of the rounds lacks, in words: ``round 2, 3, 4 without site-1``."""
    by_sites: dict[str, list[str]] = {}
    for number, sites in missing_in(rounds).items():
        by_sites.setdefault(", ".join(sites), []).append(str(number))
    return "; ".join(f"round {', '.join(by_sites[sites])} without {sites}" for sites in by_sites) or NOTHING


def completed(poc: Poc, job_id: str, folder: Path, num_rounds: int, seconds: float = 400) -> Path:
    """What a job has left that has completed all its rounds, each with the quorum; waits for it."""
    ending, download = poc.ending(job_id, seconds), poc.download(job_id, folder)
    assert ending == "FINISHED:COMPLETED", errors_of(download)
    rounds = rounds_of(download)
    assert [r["round"] for r in rounds] == list(range(num_rounds))
    assert all(len(r["sites"]) >= QUORUM for r in rounds)
    return download


def finished(
    poc: Poc, job_id: str, folder: Path, began: float, what: str, num_rounds: int, **facts: Any
) -> list[dict[str, Any]]:
    """The rounds of a job that has completed; tells its cell of the matrix."""
    rounds = rounds_of(completed(poc, job_id, folder, num_rounds))
    outcome = f"completed, {len(rounds)} of {num_rounds} rounds"
    tell_cell(what, outcome, lost_in(rounds), time.monotonic() - began, **facts)
    return rounds
