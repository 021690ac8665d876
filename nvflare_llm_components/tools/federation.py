"""Runs one job in FLARE's simulator, and believes only what it leaves on disk."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nvflare_llm_components.jobs.read import num_rounds
from nvflare_llm_components.tools.cause import cause_of, logs_of
from nvflare_llm_components.tools.runs import SiteRun, find_runs, having, of_kind, read_lines
from nvflare_llm_components.tools.shell import CommandError, Shell, tail
from nvflare_llm_components.tools.view import View


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
    def view(self) -> View:
        """What the run has come to."""
        return View(self.workspace, Console(quiet=True))

    @property
    def runs(self) -> dict[str, SiteRun]:
        """Each site's part, by the site's name."""
        return {run.folder.parent.name: run for run in find_runs(self.workspace)}


def simulate(
    shell: Shell,
    job: Path,
    workspace: Path,
    sites: Sequence[str],
    *,
    threads: int | None = None,
    also: Sequence[str] = (),
) -> Federation:
    """Allows this package in a workspace and simulates a job there.

    Args:
        shell: where the commands run.
        job: the job's folder.
        workspace: the simulator's workspace; all but its ``local`` folder is replaced.
        sites: names of the clients, one process each.
        threads: clients that work at a time; None is all of them.
        also: further classes that the job may load.

    Returns:
        The run.

    Raises:
        CommandError: the simulator failed, or left no complete run; the last line is the cause.
    """
    logs = workspace.parent / "logs"
    allow = ["nvflare-llm", "allow", str(workspace), "--new", *(w for path in also for w in ("--also", path))]
    shell.run(allow, logs / f"{job.name}-allow.txt")
    command = ["nvflare", "simulator", str(job), "-w", str(workspace)]
    command += ["-c", ",".join(sites), "-t", str(threads or len(sites))]
    console_log = logs / f"{job.name}.txt"
    view = View(workspace, shell.console, since=time.time())
    try:
        seconds = shell.run(command, console_log, view.text)
        check(workspace, sites, num_rounds(job))
    except CommandError as error:
        raise CommandError(_explained(error, workspace, sites, console_log)) from error
    return Federation(job.name, job, workspace, seconds)


def judge(workspace: Path, sites: Sequence[str], rounds: int) -> None:
    """Looks as :func:`check` does, and finds the cause.

    Raises:
        CommandError: the run is not complete; the last line is the cause.
    """
    try:
        check(workspace, sites, rounds)
    except CommandError as error:
        raise CommandError(_explained(error, workspace, sites)) from error


def _explained(
    error: CommandError, workspace: Path, sites: Sequence[str], console: Path | None = None
) -> str:
    logs = {who: log for who, log in logs_of(workspace, sites).items() if log.is_file()}
    cause = cause_of(logs) or (cause_of({"simulator": console}) if console else None)
    if cause is None:
        return str(error)
    found = str(error).splitlines()[0]
    return "\n".join(
        [found, f"Logs: {', '.join(map(str, [*([console] if console else []), *logs.values()]))}", cause]
    )


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
        done = [record["round"] for record in having(of_kind(records, "round"), "round")]
        if done != list(range(rounds)):
            log = workspace / site / "error_log.txt"
            message = f"{site}: expected {rounds} rounds. Found {done}."
            raise CommandError(f"{message}\nThe end of {log}:\n{tail(log)}")
    saved = _global_model(workspace) / "federation.json"
    found = json.loads(saved.read_text(encoding="utf-8"))["round"] if saved.is_file() else None
    if found != rounds - 1:
        raise CommandError(f"{saved}: expected the model of round {rounds - 1}. Found {found}.")


def _global_model(workspace: Path) -> Path:
    """The server's last model; where the sites have it, as in Swarm, that of the first site with one."""
    place = "simulate_job/global_model/last"
    last = workspace / "server" / place
    return last if last.is_dir() else min(workspace.glob(f"*/{place}"), default=last)
