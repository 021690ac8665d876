"""A cell of the fault matrix: a federation of four sites, a job with a quorum, what a run leaves."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.integration.deployment import Poc, deployed, records, tell_cell
from tests.integration.simulator import copy_job, executor_args, variables_of
from tests.tiny import save_tiny_model, write_site_data

SITES = ["site-1", "site-2", "site-3", "site-4"]
VICTIM, SLOW = SITES[0], SITES[-1]
QUORUM = 3
ROUNDS, GRACE_S = 3, 30
LINE_BITS_PER_S = 10e6
SHAPE = {"vocab_size": 16384, "hidden_size": 128, "tie_word_embeddings": False}
"""A message of 4 MB as int8, three seconds of the line, and a step of a tenth of a second."""
NUM_ROWS = {"site-1": 40, "site-2": 20, "site-3": 20, "site-4": 200}
NOTHING = "nothing lost"
QUICK_ENDS = {"NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "20"}
"""FLARE's server waits 15 minutes for a site that does not say how its process has ended."""


@contextmanager
def federation(folder: Path, **options: Any) -> Iterator[Poc]:
    """Four sites, up: the first over a line of 10 Mbit/s, the last one with the most to train.

    Args:
        folder: for all of it.
        options: of `deployed`.
    """
    model = save_tiny_model(folder / "model", **SHAPE)
    for site, num_rows in NUM_ROWS.items():
        write_site_data(folder / "data", [site], num_rows=num_rows)
    variables = variables_of(model, folder / "data") | QUICK_ENDS
    with deployed(folder, SITES, variables, {VICTIM: LINE_BITS_PER_S}, **options) as poc:
        yield poc


def quorum_job(
    folder: Path,
    *,
    rounds: int = ROUNDS,
    grace_s: float = GRACE_S,
    quorum: int = QUORUM,
    logging_steps: int = 1,
    **executor: Any,
) -> Path:
    """The job ``sft_int8`` for four sites that goes on with three; `executor` are arguments of that one.

    Args:
        folder: its parent.
        rounds: how many.
        grace_s: for the fourth site, in a round as in the evaluation at the end.
        quorum: results without which there is no average.
        logging_steps: steps between two points of the curves.
    """

    def with_quorum(config: dict[str, Any]) -> None:
        config |= {"num_clients": len(SITES), "num_rounds": rounds, "quorum": quorum, "grace_s": grace_s}
        config["workflows"][1]["args"]["grace_s"] = grace_s

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


def lost_of(download: Path) -> str:
    """What the rounds and the evaluation of the last model lack, in words."""
    evaluation = download / "workspace/final_evaluation.json"
    found = json.loads(evaluation.read_text())["sites"] if evaluation.exists() else []
    late = [site for site in SITES if site not in found]
    lost = [lost_in(rounds_of(download)), f"evaluation without {', '.join(late)}" if late else NOTHING]
    return "; ".join(dict.fromkeys(each for each in lost if each != NOTHING)) or NOTHING


def completed(
    poc: Poc, job_id: str, folder: Path, num_rounds: int = ROUNDS, seconds: float = 1500, quorum: int = QUORUM
) -> Path:
    """What a job has left that has completed all its rounds, each with the quorum; waits for it."""
    ending, download = poc.ending(job_id, seconds), poc.download(job_id, folder)
    assert ending == "FINISHED:COMPLETED", errors_of(download)
    rounds = rounds_of(download)
    assert [r["round"] for r in rounds] == list(range(num_rounds))
    assert all(len(r["sites"]) >= quorum for r in rounds)
    return download


def finished(
    poc: Poc, job_id: str, folder: Path, began: float, what: str, seconds: float = 1500
) -> list[dict[str, Any]]:
    """The rounds of a job that has completed; tells its cell of the matrix."""
    download = completed(poc, job_id, folder, seconds=seconds)
    rounds = rounds_of(download)
    reports = [r["round"] for r in records(poc.run_dir(VICTIM, job_id), "round")]
    tell_cell(
        what,
        f"completed, {len(rounds)} of {ROUNDS} rounds",
        lost_of(download),
        time.monotonic() - began,
        rounds_trained_twice=len(reports) - len(set(reports)),
    )
    return rounds
