"""Several processes that train one site's model together, as one engine: DDP over one machine's devices."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.names import normalised
from nvflare_llm_components.tensors.safetensors_file import DTYPE_NAMES, map_tensor_file
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.training import weights
from nvflare_llm_components.training.budget import EpochRows
from nvflare_llm_components.training.channel import Channel, ChannelClosedError, Message
from nvflare_llm_components.training.engine import LogEntry, RoundOrder, do_nothing
from nvflare_llm_components.training.image import TensorImage
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.trainer import Counts

logger = logging.getLogger(__name__)
_POLL_S = 0.05
_GRACE_S = 1.0
_TAIL_CHARACTERS = 2000
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
LOG_FOLDER = "rank_logs"


class RankError(ReportableError):
    """A rank failed or died; names it. Its traceback is in this process's log."""


class _Process:
    """One rank, as its parent sees it."""

    def __init__(self, number: int, num_processes: int, logs: Path):
        self.number, self.log = number, logs / f"rank-{number}.log"
        self.channel, theirs = Channel.pair()
        descriptor = theirs.connection.fileno()
        command = [sys.executable, "-m", "nvflare_llm_components.training.rank", str(descriptor)]
        with self.log.open("ab") as log:
            # `-m` puts the working folder first in the path: one that only we write to.
            self.process = subprocess.Popen(
                command,
                cwd=logs,
                env=_environment(number, num_processes),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[descriptor],
            )
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()

    def death(self) -> Message:
        """How it ended, and the last that it wrote: from outside, so it can forge no line of a log."""
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        tail = self.log.read_text(errors="replace")[-_TAIL_CHARACTERS:]
        last = "\n".join(map(printable, tail.splitlines()))
        return {"error": how, "traceback": last, "time": time.monotonic(), "is_dead": True}


class Ranks:
    """An engine of several processes, to which this one is a front end.

    Requests and answers are JSON over socket pairs, weights are images in memory. Ranks end with this
    process.

    Args:
        settings: What the job asks for, checked; ``num_processes`` is a number.
        run_folder: The site's run directory; the ranks' logs go into a folder of it.
        folder: Where TRL may write.
        saved: A state that :meth:`write_state` wrote, to go on from.

    Raises:
        RankError: A rank can't be built.
    """

    def __init__(self, settings: TrainingSettings, run_folder: Path, folder: Path, saved: Path | None):
        self.order = RoundOrder(boundary=0, horizon=1)
        self.poll: Callable[[], None] = do_nothing
        self.on_logs: Callable[[LogEntry], None] = do_nothing
        self.step, self.counts = 0, Counts()
        logs = run_folder.resolve() / LOG_FOLDER
        logs.mkdir(parents=True, exist_ok=True)
        self._meeting = Path(tempfile.mkdtemp(prefix="nvflare-llm-"))
        self._ranks: list[_Process] = []
        try:
            num_processes = int(settings.num_processes)
            for number in range(num_processes):
                self._ranks.append(_Process(number, num_processes, logs))
            facts = self._built(settings, folder, saved)
        except BaseException:
            self.close()
            raise
        self.has_eval_data: bool = facts["has_eval_data"]
        self.steps_per_epoch: int = facts["steps_per_epoch"]
        self._rows = EpochRows(**facts["rows"]) if facts["rows"] else None
        self._further_names: dict[str, str] = facts["further_names"]
        self._layout = {name: (tuple(shape), _DTYPES[dtype]) for name, shape, dtype in facts["layout"]}

    def snapshot(self) -> weights.StateDict:
        """The weights of rank 0, mapped from its image: all ranks have the same."""
        return map_tensor_file(Path(self._first("snapshot")))

    def under_own_names(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """``values`` with each tied weight once; see :func:`weights.under_own_names`."""
        return normalised(values, self._layout, self._further_names)

    def load(self, values: Mapping[str, Any]) -> str:
        """Write a global model into all ranks; see :func:`weights.load`."""
        image = TensorImage(self._layout, weights.checked(values, self._layout))
        try:
            return str(self._first("load", image=image.path))
        finally:
            image.close()

    def evaluate(self) -> dict[str, float]:
        """TRL's metrics over the rows of all ranks."""
        return dict(self._first("evaluate"))

    def run(self, horizon: int, lead: int, pause: Callable[[], None]) -> None:
        """See :class:`Engine`."""
        self._ask("go_on", horizon=horizon, lead=lead)
        while True:
            pause()
            start = self.step
            self.counts = self._summed(self._ask("go_on", **asdict(self.order)), start)

    def write_state(self, folder: Path) -> None:
        """Let each rank write its part."""
        self._ask("write_state", folder=str(folder.resolve()))

    def save_model(self, folder: Path) -> None:
        """Let rank 0 write it."""
        self._ask("save_model", folder=str(folder.resolve()))

    def close(self) -> None:
        """Kill the ranks: a state on disk is whole at any moment. May be called twice."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.process.kill()
        for rank in ranks:
            rank.kill()
        shutil.rmtree(self._meeting, ignore_errors=True)

    def _built(self, settings: TrainingSettings, folder: Path, saved: Path | None) -> Message:
        for rank in self._ranks:
            self._send(
                rank,
                number=rank.number,
                num_processes=len(self._ranks),
                rendezvous=str(self._meeting / "rendezvous"),
                is_on_gpu=settings.is_on_gpu,
                settings=settings.to_json(),
                folder=str(folder.resolve()),
                saved=str(saved.resolve()) if saved else None,
            )
        return dict(self._answers()[0]["answer"])

    def _ask(self, name: str, **arguments: Any) -> list[Message]:
        """Ask all ranks."""
        if not self._ranks:
            raise RankError("The ranks of this site have ended.")
        for rank in self._ranks:
            self._send(rank, name=name, arguments=arguments)
        return self._answers()

    def _first(self, name: str, **arguments: Any) -> Any:
        """Ask all ranks, and return what rank 0 answers."""
        return self._ask(name, **arguments)[0]["answer"]

    def _send(self, rank: _Process, **message: Any) -> None:
        # Its end is found where its answer is awaited, together with its reason.
        with suppress(ChannelClosedError):
            rank.channel.send(**message)

    def _answers(self) -> list[Message]:
        try:
            answers = self._collect()
        except BaseException:
            self.close()
            raise
        self.step = answers[0]["step"]
        return answers

    def _summed(self, answers: list[Message], start: int) -> Counts:
        """What the ranks processed since step ``start``; a row that fills up a last batch counts once."""
        counts = [answer["counts"] for answer in answers]
        num_examples = sum(count["num_examples"] for count in counts)
        if self._rows:
            num_examples = self._rows.until(self.step) - self._rows.until(start)
        return Counts(
            num_examples=num_examples,
            num_tokens=sum(count["num_tokens"] for count in counts),
            loss_sum=sum(count["loss_sum"] for count in counts) / len(counts),
        )

    def _collect(self) -> list[Message]:
        """One answer of each rank, in order; a failure is told after a grace period, for the true cause."""
        waiting = {rank.channel.connection: rank for rank in self._ranks}
        answers: dict[int, Message] = {}
        failures: dict[int, Message] = {}
        deadline = float("inf")
        while waiting and time.monotonic() < deadline:
            self.poll()
            for connection in wait(list(waiting), _POLL_S):
                rank = waiting[cast(Connection, connection)]
                message = _message_of(rank)
                if "log" in message:
                    self.on_logs(LogEntry(**message["log"]))
                    continue
                del waiting[rank.channel.connection]
                (answers if "answer" in message else failures)[rank.number] = message
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            raise self._blamed(failures)
        return [answers[number] for number in sorted(answers)]

    def _blamed(self, failures: dict[int, Message]) -> RankError:
        """A rank that died takes the others with it: their errors come first and are not the cause."""
        by_time = sorted(
            failures, key=lambda number: (not failures[number]["is_dead"], failures[number]["time"])
        )
        number, num_processes = by_time[0], len(self._ranks)
        failure = failures[number]
        logger.warning("Rank %d of %d:\n%s", number, num_processes, failure["traceback"])
        where = f"{LOG_FOLDER}/{self._ranks[number].log.name} of this site's run directory"
        return RankError(
            f"Rank {number} of {num_processes} {failure['error'].rstrip('.')}. Its log is {where}."
        )


def _message_of(rank: _Process) -> Message:
    try:
        message = rank.channel.receive()
    except ChannelClosedError:
        return rank.death()
    if "error" in message:
        message |= {"error": f"failed: {message['error']}", "is_dead": False}
    return message


def _environment(number: int, num_processes: int) -> dict[str, str]:
    """What accelerate looks for, and a fair share of the cores, unless the site says otherwise."""
    share = max(len(os.sched_getaffinity(0)) // num_processes, 1)
    package = str(Path(__file__).parents[2])
    return {
        "OMP_NUM_THREADS": str(share),
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }


def processes_for(settings: TrainingSettings) -> int:
    """How many processes a job's ``num_processes`` means on this machine.

    Raises:
        ReportableError: It has fewer devices.
    """
    asked = settings.num_processes
    if asked == 1:
        return 1
    cores = len(os.sched_getaffinity(0))
    kind, found = ("GPUs", torch.cuda.device_count()) if settings.is_on_gpu else ("cores", cores)
    if asked == "auto":
        return found if settings.is_on_gpu else 1
    if asked > found:
        raise ReportableError(
            f"num_processes: expected {asked} {kind}, found {found}. Set num_processes to what every site "
            "has, or to 'auto'."
        )
    return asked
