"""Submits a job to a federation and stays with it: where it is lost, it is continued, to its end."""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from nvflare.apis.job_def import RunStatus
from nvflare.apis.utils.format_check import check_job_id
from rich.console import Console

from nvflare_llm_components.checkpoint.global_models import FOLDER, earlier_model
from nvflare_llm_components.checkpoint.manifest import read_manifest
from nvflare_llm_components.tensors.atomic import replace_text
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools.deployment import JobState, UnreachableError, takes_token
from nvflare_llm_components.tools.in_place import continue_in_place
from nvflare_llm_components.tools.resume import resume_job
from nvflare_llm_components.tools.shell import CommandError

CHAIN_FILE = "chain.json"
LOST = "server restarted"
_COMPLETED = str(RunStatus.FINISHED_COMPLETED.value)
_NEVER_CONTINUED = (RunStatus.FINISHED_ABORTED.value, RunStatus.FINISHED_CANT_SCHEDULE.value)
_WAITING = (RunStatus.SUBMITTED.value, RunStatus.APPROVED.value)
_T = TypeVar("_T")


class Federation(Protocol):
    """What is asked of a federation: see :class:`.deployment.Deployment`."""

    def submit(self, job: Path, token: str | None) -> str: ...  # noqa: D102
    def jobs(self, name: str) -> set[str]: ...  # noqa: D102
    def state(self, job_id: str) -> JobState: ...  # noqa: D102
    def progress(self, job_id: str) -> dict[str, object]: ...  # noqa: D102
    def saved_round(self, job_id: str) -> int | None: ...  # noqa: D102
    def sites(self, job_id: str) -> set[str]: ...  # noqa: D102
    def connected(self) -> set[str]: ...  # noqa: D102
    def download(self, job_id: str, folder: Path) -> Path: ...  # noqa: D102


@dataclass
class Run:
    """One job of the chain.

    Attributes:
        job: the folder that was submitted.
        token: with which it is submitted once, however often it is asked.
        known: the server's jobs of this name before it was submitted; what comes to them without a token is
            this one.
        job_id: empty until the server has taken it.
        server_started: seconds since 1970: which process of the server took it.
        submitted: when, in UTC.
        ending: how it ended; empty while it goes on.
        saved_round: latest round whose model it left; None for none.
    """

    job: str
    token: str = field(default_factory=lambda: str(uuid.uuid4()))
    known: list[str] | None = None
    job_id: str = ""
    server_started: float = 0.0
    submitted: str = ""
    ending: str = ""
    saved_round: int | None = None


@dataclass
class Launch:
    """A job and its continuations. The chain lies in `out`, so that a second call goes on with it.

    Attributes:
        federation: where it runs.
        out: folder for ``chain.json``, the jobs that continue it, and the result.
        console: where to tell of it.
        every_s: seconds between two looks.
        sites_s: seconds that the sites of a job have to come back, before it is continued without them.
    """

    federation: Federation
    out: Path
    console: Console
    every_s: float = 5.0
    sites_s: float = 300.0
    _is_away: bool = False
    _told: object = None

    def to_the_end(self, job: Path) -> Path:
        """Stay with a job until it is complete.

        A job whose server was restarted is continued always; one that failed, where it got a round further.

        Args:
            job: its folder.

        Returns:
            What it left: the folder that FLARE's download wrote.

        Raises:
            CommandError: it was ended on purpose, failed without getting further, or nothing of it is left.
            ValueError: `out` belongs to another job, or it can't begin in the middle.
        """
        chain = self._chain(job)
        while True:
            run = chain[-1]
            if not run.job_id:
                self._wait_for_sites(chain[:-1])
                self._submit(run, chain)
            run.ending = run.ending or self._ending(run)
            self._keep(chain)
            self._say(f"{run.job_id}: {run.ending}")
            if run.ending == _COMPLETED:
                return self._patiently(partial(self._result, run))
            if run.ending in _NEVER_CONTINUED:
                raise CommandError(f"{run.job_id}: {run.ending}. It is not continued by itself.")
            chain.append(Run(str(self._continued(chain))))
            self._keep(chain)

    def _chain(self, job: Path) -> list[Run]:
        file = self.out / CHAIN_FILE
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            return [Run(str(job.resolve()))]
        chain = [Run(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["runs"]]
        if chain[0].job != str(job.resolve()):
            raise ValueError(f"{file}: expected the chain of {job.resolve()}, found that of {chain[0].job}.")
        return chain

    def _keep(self, chain: list[Run]) -> None:
        content = {"runs": [asdict(run) for run in chain]}
        replace_text(self.out / CHAIN_FILE, json.dumps(content, indent=2) + "\n")

    def _wait_for_sites(self, earlier: list[Run]) -> None:
        """Let the sites of the chain's jobs come back: FLARE begins a job with those that are there.

        All jobs of it are asked: a site that was late for one of them belongs to the next.
        """
        wanted: set[str] = set()
        for run in earlier:
            wanted |= self._patiently(partial(self.federation.sites, run.job_id))
        began, told = time.monotonic(), False
        while wanted and (missing := wanted - self._patiently(self.federation.connected)):
            names = ", ".join(sorted(missing))
            if time.monotonic() - began >= self.sites_s:
                self._say(f"Not back after {self.sites_s:g} s: {names}. The job is continued without.")
                return
            if not told:
                self._say(f"Waits up to {self.sites_s:g} s until these sites are connected again: {names}")
            told = True
            time.sleep(self.every_s)

    def _submit(self, run: Run, chain: list[Run]) -> None:
        job = Path(run.job)
        name = json.loads((job / "meta.json").read_text(encoding="utf-8"))["name"]
        if run.known is None:
            run.known = sorted(self._patiently(lambda: self.federation.jobs(name)))
        self._keep(chain)  # token and known jobs first: whatever comes between, it is not submitted twice
        if takes_token(job):
            job_id = self._patiently(lambda: self.federation.submit(job, run.token))
        else:
            job_id = self._patiently(lambda: self._taken(run, name) or self.federation.submit(job, None))
        check_job_id(job_id)  # it becomes a folder's name here, and part of a path on the server
        run.job_id = job_id
        run.server_started = self._patiently(lambda: self.federation.state(run.job_id)).server_started
        run.submitted = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._keep(chain)
        self._say(f"{run.job_id}: submitted")

    def _taken(self, run: Run, name: str) -> str:
        """The job that an earlier try has submitted, whose answer was lost; empty for none."""
        taken = sorted(self.federation.jobs(name) - set(run.known or ()))
        if len(taken) > 1:
            raise CommandError(
                f"Jobs called '{name}' were submitted while the server did not answer: {', '.join(taken)}. "
                "Stop those that are not this one (nvflare job abort, delete), and give this command again."
            )
        return taken[0] if taken else ""

    def _ending(self, run: Run) -> str:
        """How a run ended; waits for it."""
        while True:
            state = self._patiently(lambda: self.federation.state(run.job_id))
            if state.is_over:
                return LOST if state.status == RunStatus.ABANDONED.value else state.status
            if state.is_running or state.status in _WAITING:
                run.server_started = state.server_started
            elif state.server_started != run.server_started:
                return LOST  # FLARE goes on calling it RUNNING for ever
            if state.is_running:
                self._tell(run)
            time.sleep(self.every_s)

    def _continued(self, chain: list[Run]) -> Path:
        """The folder of the job that continues the last run."""
        run, folder = chain[-1], self.out / f"job_{len(chain) + 1}"
        if run.ending == LOST:
            run.saved_round = self._patiently(lambda: self.federation.saved_round(run.job_id))
            self._say(continue_in_place(Path(run.job), folder, run.job_id, run.saved_round))
            return folder
        download = self._patiently(lambda: self._result(run))
        job = sorted(download.glob("job/*/meta.json"))
        run.saved_round = _saved_round(download)
        before = [earlier.saved_round for earlier in chain[:-1] if earlier.saved_round is not None]
        other = f"`nvflare-llm resume {download} --out JOB` goes on from it."
        if run.saved_round is None or run.saved_round <= max(before, default=-1):
            raise CommandError(
                f"{run.job_id}: {run.ending}, and it got no round further, so that it is not continued. What "
                f"it left, logs included: {download}. {other}"
            )
        earlier = job[0].parent if job else Path(run.job)
        self._say(resume_job(download, folder, earlier, does_end=True))
        return folder

    def _result(self, run: Run) -> Path:
        found = self.out / run.job_id
        return found if found.is_dir() else self.federation.download(run.job_id, self.out)

    def _tell(self, run: Run) -> None:
        try:
            progress = self.federation.progress(run.job_id)
        except (UnreachableError, CommandError):
            return  # told again at the next look
        if progress and progress != self._told:
            self._told = progress
            self._say(", ".join(f"{name} {value}" for name, value in progress.items()))

    def _patiently(self, ask: Callable[[], _T]) -> _T:
        """The answer, however long the server is away."""
        while True:
            try:
                answer = ask()
            except UnreachableError as error:
                if not self._is_away:
                    self._say(f"The server does not answer; it is asked again and again. {error}")
                self._is_away = True
                time.sleep(self.every_s)
            else:
                self._is_away = False
                return answer

    def _say(self, text: str) -> None:
        at = datetime.now().strftime("%H:%M:%S")
        for line in text.splitlines():
            self.console.print(f"{at} {printable(line, 4000)}", highlight=False, markup=False, soft_wrap=True)


def _saved_round(download: Path) -> int | None:
    model = earlier_model(download / "workspace" / FOLDER)
    return int(read_manifest(model)["round"]) if model else None
