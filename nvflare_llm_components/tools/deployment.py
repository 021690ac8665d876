"""A federation that is up, as an administrator's kit reaches it; it is connected to anew after each break."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nvflare.apis.fl_exception import FLCommunicationError
from nvflare.apis.job_def import SERVER_SITE_NAME, JobMetaKey
from nvflare.fuel.flare_api.api_spec import (
    AuthenticationError,
    AuthorizationError,
    InternalError,
    InvalidJobDefinition,
    JobNotFound,
    NoConnection,
    NoReply,
    SessionClosed,
    TargetType,
)
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.tool.kit.kit_config import StartupKitConfigError, resolve_admin_user_and_dir_from_startup_kit

from nvflare_llm_components.checkpoint.global_models import FOLDER, LAST, MASTER
from nvflare_llm_components.checkpoint.manifest import MANIFEST_FILE
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools.shell import CommandError

_T = TypeVar("_T")
_CONNECT_S = 10.0
_MOST_TO_HASH = 10 * 2**20
_BROKEN = (NoConnection, SessionClosed, AuthenticationError, NoReply, InternalError, FLCommunicationError)


class UnreachableError(Exception):
    """The server does not answer now."""


def takes_token(job: Path) -> bool:
    """Whether a job can be submitted with a token: FLARE's server hashes its files for it, up to 10 MiB each.

    It answers a larger one, such as the model that a job goes on from, with an error of its own.
    """
    return all(file.stat().st_size <= _MOST_TO_HASH for file in job.rglob("*") if file.is_file())


@dataclass(frozen=True)
class JobState:
    """How a job stands.

    Attributes:
        status: FLARE's word: SUBMITTED, RUNNING, FINISHED:COMPLETED, ...
        is_running: whether the server that answers has it in hand.
        server_started: seconds since 1970, by the server's clock.
    """

    status: str
    is_running: bool
    server_started: float

    @property
    def is_over(self) -> bool:
        """Whether FLARE has done with it."""
        return self.status.startswith("FINISHED:")


class Deployment:
    """Asks a federation's server, in a session that is opened when it is needed."""

    def __init__(self, kit: Path, study: str = "default"):
        """Find the user of a kit.

        Args:
            kit: an administrator's startup kit.
            study: that jobs are submitted to.

        Raises:
            ValueError: it is no such kit.
        """
        try:
            self._user, self._kit = resolve_admin_user_and_dir_from_startup_kit(str(kit))
        except (StartupKitConfigError, ValueError) as error:
            raise ValueError(
                f"{kit}: expected an administrator's startup kit, with startup/fed_admin.json. "
                f"Found: {printable(error)}"
            ) from error
        self._study = study
        self._session: Session | None = None

    def submit(self, job: Path, token: str | None) -> str:
        """Submit a job; the same token submits it once, however often it is asked.

        Args:
            job: its folder.
            token: None where there can be none, see :func:`takes_token`.

        Raises:
            CommandError: the server refuses it.
            UnreachableError: it does not answer.
        """
        return str(self._ask(lambda session: session.submit_job(str(job), submit_token=token)))

    def jobs(self, name: str) -> set[str]:
        """Ids of all jobs of a name that the server knows, and this user may see.

        Raises:
            UnreachableError: it does not answer.
        """
        found = self._ask(lambda session: session.list_jobs(name_prefix=name))
        return {str(job.get("job_id")) for job in found if job.get("job_name") == name}

    def state(self, job_id: str) -> JobState:
        """How a job stands.

        Raises:
            CommandError: the server knows no such job.
            UnreachableError: it does not answer.
        """
        meta = self._ask(lambda session: session.get_job_meta(job_id))
        system = self._ask(lambda session: session.get_system_info())
        running = {job.job_id for job in system.job_info}
        return JobState(str(meta.get("status")), job_id in running, float(system.server_info.start_time))

    def progress(self, job_id: str) -> dict[str, Any]:
        """Number of the round, results so far and loss, as `RoundLog` tells them; empty for nothing."""
        stats = self._ask(lambda session: session.show_stats(job_id, TargetType.SERVER))
        told = stats.get(SERVER_SITE_NAME) if isinstance(stats, dict) else None
        found = told.get("federation") if isinstance(told, dict) else None
        return found if isinstance(found, dict) else {}

    def saved_round(self, job_id: str) -> int | None:
        """The latest round whose model lies in a job's run directory on the server; None for none.

        Raises:
            CommandError: the run directory is not there, or this user may not read it.
            UnreachableError: the server does not answer.
        """
        root = self._ask(lambda session: session.ls_target(SERVER_SITE_NAME))
        if job_id not in str(root).split():
            raise CommandError(
                f"The server came back without the run directory of job {job_id}: what it learned is lost. "
                "Let the server's workspace lie on a disk that outlives its process or container."
            )
        names = [name for kept in (MASTER, LAST) for name in (kept, f".{kept}.previous")]
        files = [f"{job_id}/{FOLDER}/{name}/{MANIFEST_FILE}" for name in names]
        found = [self._round_in(file) for file in files]
        return max((number for number in found if number is not None), default=None)

    def sites(self, job_id: str) -> set[str]:
        """The sites that a job was given to, as the server's store remembers it; empty before that.

        Raises:
            CommandError: the server knows no such job.
            UnreachableError: it does not answer.
        """
        meta = self._ask(lambda session: session.get_job_meta(job_id))
        told = (str(line).rpartition(": ") for line in meta.get(JobMetaKey.JOB_DEPLOY_DETAIL.value) or ())
        return {name for name, _, outcome in told if outcome == "OK"} - {SERVER_SITE_NAME}

    def connected(self) -> set[str]:
        """The sites that are connected now.

        Raises:
            UnreachableError: the server does not answer.
        """
        return {str(client.name) for client in self._ask(lambda s: s.get_system_info()).client_info}

    def download(self, job_id: str, folder: Path) -> Path:
        """Fetch what a job that is over has left into a folder of its id; returns that one.

        Raises:
            CommandError: the server has nothing of it.
            UnreachableError: it does not answer.
        """
        self._ask(lambda session: session.download_job_result(job_id, str(folder)))
        return folder / job_id

    def close(self) -> None:
        """End the session, if there is one."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception):  # it ends in any case
                session.close()

    def _round_in(self, file: str) -> int | None:
        content = self._ask(lambda session: session.cat_target(SERVER_SITE_NAME, file=file))
        try:
            number = json.loads(content)["round"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None  # what `cat` says of a file that is not there
        return number if isinstance(number, int) and not isinstance(number, bool) else None

    def _ask(self, question: Callable[[Session], _T]) -> _T:
        """Ask in the present session, and once more in a fresh one where it has become stale."""
        for is_last in (False, True):
            try:
                if self._session is None:
                    self._session = new_secure_session(
                        self._user, self._kit, timeout=_CONNECT_S, study=self._study, auto_login_max_tries=1
                    )
                return question(self._session)
            except (AuthorizationError, InvalidJobDefinition, JobNotFound) as error:
                raise CommandError(f"The server refuses: {printable(error)}") from error
            except _BROKEN as error:
                self.close()
                if is_last:
                    raise UnreachableError(printable(error)) from error
        raise AssertionError("unreachable")
