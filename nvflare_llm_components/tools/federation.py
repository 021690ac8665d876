"""Runs one job in FLARE's simulator, and believes only what it leaves on disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nvflare_llm_components.tools.job import num_rounds
from nvflare_llm_components.tools.runs import Record, SiteRun, find_runs, read_lines
from nvflare_llm_components.tools.shell import CommandError, Shell, tail


@dataclass(frozen=True)
class Federation:
    """A job that has run to its end.

    Attributes:
        name: of the job.
        job: the job's folder.
        workspace: the simulator's workspace.
        seconds: from the simulator's start to its end.
    """

    name: str
    job: Path
    workspace: Path
    seconds: float

    @property
    def model(self) -> Path:
        """The folder of the last global model."""
        return _global_model(self.workspace)

    @property
    def runs(self) -> dict[str, SiteRun]:
        """Each site's part, by the site's name."""
        return {run.folder.parent.name: run for run in find_runs(self.workspace)}


def simulate(shell: Shell, job: Path, workspace: Path, sites: Sequence[str]) -> Federation:
    """Allows this package in a workspace and simulates a job there.

    Args:
        shell: where the commands run.
        job: the job's folder.
        workspace: the simulator's workspace; all but its ``local`` folder is replaced.
        sites: names of the clients, one process each.

    Returns:
        The run.

    Raises:
        CommandError: the simulator failed, or left no complete run; with the last lines of the logs.
    """
    logs = workspace.parent / "logs"
    shell.run(["nvflare-llm", "allow", str(workspace)], logs / f"{job.name}-allow.txt")
    command = ["nvflare", "simulator", str(job), "-w", str(workspace)]
    command += ["-c", ",".join(sites), "-t", str(len(sites))]
    progress = Progress(shell, workspace, sites)
    try:
        seconds = shell.run(command, logs / f"{job.name}.txt", progress.watch)
    except CommandError as error:
        raise CommandError(_with_logs(str(error), workspace, ["server", *sites])) from error
    check(workspace, sites, num_rounds(job))
    return Federation(job.name, job, workspace, seconds)


def check(workspace: Path, sites: Sequence[str], rounds: int) -> None:
    """Looks for what a complete run leaves: the simulator exits with 0 even if clients died.

    Args:
        workspace: the simulator's workspace.
        sites: names of the clients.
        rounds: number of rounds.

    Raises:
        CommandError: a site did not train every round, or the last round's model is not there.
    """
    for site in sites:
        records = read_lines(workspace / site / "simulate_job" / "metrics.jsonl")
        done = [record["round"] for record in records if record["kind"] == "round"]
        if done != list(range(rounds)):
            raise CommandError(
                _with_logs(f"{site}: expected {rounds} rounds. Found {done}.", workspace, [site, "server"])
            )
    saved = _global_model(workspace) / "federation.json"
    found = json.loads(saved.read_text(encoding="utf-8"))["round"] if saved.is_file() else None
    if found != rounds - 1:
        message = f"{saved}: expected the model of round {rounds - 1}. Found {found}."
        raise CommandError(_with_logs(message, workspace, ["server"]))


def _global_model(workspace: Path) -> Path:
    return workspace / "server" / "simulate_job" / "global_model" / "last"


def _with_logs(message: str, workspace: Path, sites: Sequence[str]) -> str:
    logs = [workspace / site / "error_log.txt" for site in sites]
    return "\n".join([message, *(f"The end of {log}:\n{tail(log)}" for log in logs)])


@dataclass
class Progress:
    """Tells of a running simulation from the records that its sites write."""

    shell: Shell
    workspace: Path
    sites: Sequence[str]
    _told: dict[str, int] = field(default_factory=dict)

    def watch(self) -> str:
        """Prints a line for each round that a site has begun or ended since the last call.

        Returns:
            Where each site is now.
        """
        now = []
        for site in self.sites:
            records = read_lines(self.workspace / site / "simulate_job" / "metrics.jsonl")
            for record in records[self._told.get(site, 0) :]:
                if line := _line(record):
                    self.shell.console.print(f"  {site:8} {line}", highlight=False)
            self._told[site] = len(records)
            steps = [record for record in records if record["kind"] == "train"]
            now.append(f"{site}: step {steps[-1]['step']}, loss {steps[-1]['loss']:.2f}" if steps else "")
        return "  ".join(now)


def _line(record: Record) -> str:
    if record["kind"] == "eval":
        return f"round {record['round']}  global model: eval loss {record['eval_loss']:.3f}"
    if record["kind"] == "round":
        return (
            f"round {record['round']}  trained {record['num_steps']} steps: loss {record['train_loss']:.3f}"
        )
    return ""
