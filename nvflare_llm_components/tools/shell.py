"""Runs commands as a user types them: echoed, logged to a file, and failing loudly."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from nvflare_llm_components.tools.environment import with_recommended

# What a user types, and how this interpreter's own installation of it is started.
_PROGRAMS = {"nvflare": "nvflare.cli", "nvflare-llm": "nvflare_llm_components.cli"}


class CommandError(RuntimeError):
    """A command failed, or left something else than it should have."""


@dataclass(frozen=True)
class Shell:
    """Where commands run.

    Attributes:
        console: shows commands and progress.
        variables: environment variables for all commands, beside the present ones.
        timeout_s: a command that takes longer has failed.
    """

    console: Console
    variables: dict[str, str]
    timeout_s: float = 900

    def export(self) -> None:
        """Shows the variables as the line that sets them."""
        assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.variables.items())
        self._echo(f"export {assignments}")

    def run(self, command: Sequence[str], log: Path, watch: Callable[[], str] | None = None) -> float:
        """Runs a command to its end.

        Args:
            command: program (``nvflare`` or ``nvflare-llm``) and arguments.
            log: file for its output.
            watch: called twice a second; what it returns is shown beside the spinner.

        Returns:
            Seconds it took.

        Raises:
            CommandError: its exit code was not 0, or it took too long; with the last lines of its output.
        """
        self._echo(shlex.join(command))
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as output:
            code = self._wait(_start(command, self.variables, output), started, watch)
        if code != 0:
            found = "it did not end in time" if code is None else f"exit code {code}"
            raise CommandError(f"`{shlex.join(command)}`: {found}. The end of {log}:\n{tail(log)}")
        return time.monotonic() - started

    def _echo(self, line: str) -> None:
        self.console.print(f"$ {line}", style="bold", markup=False, highlight=False, soft_wrap=True)

    def _wait(
        self, process: "subprocess.Popen[str]", started: float, watch: Callable[[], str] | None
    ) -> int | None:
        try:
            with self.console.status("") as status:
                while process.poll() is None and time.monotonic() - started < self.timeout_s:
                    seconds = round(time.monotonic() - started)
                    status.update(Text(f"{seconds} s {watch() if watch else ''}"))
                    time.sleep(0.5)
            return process.poll()
        finally:
            _end(process)
            if watch:
                watch()


def tail(log: Path, num_lines: int = 15) -> str:
    """The last lines of a log, or a word that there is none."""
    if not log.is_file():
        return "(no such file)"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def _start(command: Sequence[str], variables: dict[str, str], output: IO[str]) -> "subprocess.Popen[str]":
    program, *arguments = command
    # A group of its own: FLARE's clients outlive a killed simulator, but the group's signal reaches them.
    return subprocess.Popen(
        [sys.executable, "-m", _PROGRAMS[program], *arguments],
        env=with_recommended(os.environ | variables),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
