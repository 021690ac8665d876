"""Looks at a job, its sites and this machine before anything runs: seconds instead of a failed job."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools.checks import data, job, machine
from nvflare_llm_components.tools.checks.subject import Check, Finding, Subject, error

CHECKS: tuple[Check, ...] = (*job.CHECKS, *data.CHECKS, *machine.CHECKS)
_COLOURS = {"error": "red", "warning": "yellow", "note": "default"}


def check(
    job: Path, sites: Sequence[str], workspace: Path | None = None, also: Sequence[str] = ()
) -> list[Finding]:
    """All that the checks find, errors first.

    Args:
        job: the job's folder.
        sites: names of the sites that would run it on this machine.
        workspace: of the simulator, or a startup kit; None if there is none yet.
        also: further classes that will be allowed.

    Raises:
        ValueError: the folder is no job.
    """
    subject = Subject(job, tuple(sites), workspace, tuple(also))
    subject.texts, subject.server, subject.clients  # noqa: B018 - a folder that is no job has one fault
    found = [finding for each in CHECKS for finding in _guarded(each, subject)]
    order = list(_COLOURS)
    return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.level))


def _guarded(each: Check, subject: Subject) -> list[Finding]:
    try:
        return list(each(subject))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as fault:
        what = (each.__doc__ or each.__name__).splitlines()[0]
        return [error(f"{what} Found another structure in the job: {printable(repr(fault), 200)}.")]


def show(findings: Sequence[Finding], console: Console | None = None) -> bool:
    """Prints what was found; True if there is no error."""
    console = console or Console()
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        level = Text(finding.level, style=_COLOURS[finding.level])
        table.add_row(level, Text(printable(finding.sentence, 2000), overflow="fold"))
    console.print(table)
    num_errors = sum(finding.level == "error" for finding in findings)
    verdict = f"{num_errors} error{'s' * (num_errors > 1)}" if num_errors else "Nothing stands in the way."
    console.print(verdict, style="bold red" if num_errors else "bold green")
    return not num_errors
