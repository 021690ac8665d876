"""Runs a job in the simulator: checked, allowed, watched, and judged in the last line."""

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nvflare_llm_components.components import COMPONENTS
from nvflare_llm_components.jobs.read import resolved
from nvflare_llm_components.tensors.text import duration
from nvflare_llm_components.tools.checks.check import check, show
from nvflare_llm_components.tools.checks.data import first_row
from nvflare_llm_components.tools.checks.subject import Subject
from nvflare_llm_components.tools.federation import Federation, simulate
from nvflare_llm_components.tools.shell import CommandError, Shell
from nvflare_llm_components.tools.view import View

_NEVER_S = 10 * 365 * 86400.0


def run(
    job: Path,
    workspace: Path,
    sites: Sequence[str],
    *,
    threads: int | None = None,
    also: Sequence[str] = (),
    console: Console | None = None,
) -> Federation:
    """Checks a job, allows this package in the workspace, simulates, and says what came of it.

    Args:
        job: the job's folder.
        workspace: of the simulator; what an earlier run left there is replaced.
        sites: names of the sites.
        threads: sites that work at a time; None is all of them.
        also: further classes that the job may load, by exact path.
        console: where to print.

    Raises:
        ValueError: the folder is no job.
        CommandError: the job has an error, failed, or was ended by the user; the last line is the cause.
    """
    console = console or Console()
    variables = _places(job, sites) | _of_processes(threads or len(sites))
    os.environ.update(variables)
    warnings = _checked(job, workspace, sites, also, console)
    if threads and threads < len(sites):
        console.print(
            f"With {threads} threads for {len(sites)} sites FLARE starts a site's process anew for each "
            "task, which takes longer.",
            style="yellow",
        )
    if (workspace / "server").is_dir():
        console.print(f"{workspace}: what an earlier run left there is replaced.", style="yellow")
    shell = Shell(console, variables, timeout_s=_NEVER_S)
    shell.export()
    started = time.time()
    try:
        federation = simulate(shell, job.resolve(), workspace.resolve(), sites, threads=threads, also=also)
    except KeyboardInterrupt:
        raise CommandError(_interrupted(workspace, started)) from None
    for line in (*warnings, *_next(federation, sites[0]), _verdict(federation, len(sites))):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return federation


def _checked(
    job: Path, workspace: Path, sites: Sequence[str], also: Sequence[str], console: Console
) -> list[str]:
    """What to be warned of once more at the end; raises where the job should not be started."""
    findings = check(job, sites, workspace, [*COMPONENTS, *also])  # which are allowed before it starts
    if not show(findings, console):
        causes = [finding.sentence for finding in findings if finding.level == "error"]
        raise CommandError(f"The job was not started.\n{causes[0]}")
    if not Subject(job, tuple(sites)).executors:
        command = shlex.join(["nvflare", "simulator", str(job), "-w", str(workspace), "-c", ",".join(sites)])
        raise CommandError(
            f"{job}: expected sites with HFSFTExecutor, by whose records `run` judges. Found none. "
            f"Type: nvflare-llm allow {shlex.quote(str(workspace))} --new, then: {command} -t {len(sites)}"
        )
    return [f"Warning: {finding.sentence}" for finding in findings if finding.level == "warning"]


def _interrupted(workspace: Path, since: float) -> str:
    done = len(View(workspace, Console(quiet=True), since).rounds())
    if not done:
        return "Ended by you, before the first round was done."
    rounds = f"{done} round{'s' * (done > 1)} done"
    place = shlex.quote(str(workspace))
    return f"Ended by you, with {rounds}. To go on: nvflare-llm resume {place} --out FOLDER, and run that."


def _places(job: Path, sites: Sequence[str]) -> dict[str, str]:
    """A site lets jobs read below what its environment names: on one's own machine, the paths of the job."""
    config = resolved(job, "client", sites[0]) if sites else {}
    wanted = {"NVFLARE_LLM_MODEL": config.get("model"), "NVFLARE_LLM_DATA": config.get("data_root")}
    return {
        name: os.environ.get(name) or value
        for name, value in wanted.items()
        if isinstance(value, str) and "{" not in value
    }


def _of_processes(num_at_a_time: int) -> dict[str, str]:
    """Threads of a process, unless the user has said: trainings on the same cores wait for each other."""
    num_threads = max(1, (os.cpu_count() or 1) // max(1, num_at_a_time))
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(num_threads)),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _verdict(federation: Federation, num_sites: int) -> str:
    course = federation.view.course()
    loss = f"eval loss {course[0]:.4f} -> {course[-1]:.4f}, " if len(course) > 1 else ""
    sites = f"{num_sites} site{'s' * (num_sites != 1)}"
    return f"Done: {sites}, {loss}{duration(federation.seconds)}. The model: {federation.model}"


def _next(federation: Federation, site: str) -> list[str]:
    workspace = shlex.quote(str(federation.workspace))
    executor = Subject(federation.job, (site,)).executors.get(site, {})
    first = first_row(executor.get("train_data")) or {}
    chat = " --chat" if "messages" in first else ""  # asked as it was trained
    return [
        "Next:",
        f"  nvflare-llm plot {workspace} -o curves.png",
        f"  nvflare-llm report {workspace} -o report.html",
        f"  nvflare-llm traffic {workspace}",
        f"  nvflare-llm generate {shlex.quote(str(federation.model))} --prompt 'Your question'{chat}",
    ]
