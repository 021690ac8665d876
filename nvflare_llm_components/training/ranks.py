"""Several processes that train one site's model together, as one engine, and what they are asked."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.names import normalised
from nvflare_llm_components.tensors.safetensors_file import DTYPE_NAMES, map_tensor_file
from nvflare_llm_components.training import weights
from nvflare_llm_components.training.budget import EpochRows
from nvflare_llm_components.training.channel import ChannelClosedError, Message
from nvflare_llm_components.training.engine import LogEntry, RoundOrder, do_nothing
from nvflare_llm_components.training.group import Group, LocalRank
from nvflare_llm_components.training.image import TensorImage
from nvflare_llm_components.training.nodes import RemoteRank
from nvflare_llm_components.training.process import log_name
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.trainer import Counts

logger = logging.getLogger(__name__)
_POLL_S = 0.05
_GRACE_S = 1.0
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
LOG_FOLDER = "rank_logs"
_Rank = LocalRank | RemoteRank


class RankError(ReportableError):
    """A rank failed or died; names it. Its traceback is in this process's log."""


class Ranks:
    """An engine of several processes, to which this one is a front end.

    Requests and answers are JSON over a channel to each, weights are images in memory. Ranks end with this
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
        self._end = RankError("The ranks of this site have ended.")
        logs = run_folder.resolve() / LOG_FOLDER
        logs.mkdir(parents=True, exist_ok=True)
        self._group = Group(int(settings.num_processes), settings.is_on_gpu, logs)
        try:
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

    def present(self) -> weights.StateDict:
        """See :meth:`snapshot`: an image of its own."""
        return self.snapshot()

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
        self._group.close()

    def _built(self, settings: TrainingSettings, folder: Path, saved: Path | None) -> Message:
        for rank in self._group.ranks:
            self._send(
                rank,
                number=rank.number,
                num_processes=len(self._group.ranks),
                rendezvous=self._group.rendezvous,
                spans_nodes=self._group.spans_nodes,
                settings=settings.to_json(),
                folder=str(folder.resolve()),
                saved=str(saved.resolve()) if saved else None,
            )
        return dict(self._answers()[0]["answer"])

    def _ask(self, name: str, **arguments: Any) -> list[Message]:
        """Ask all ranks."""
        if not self._group.ranks:
            raise self._end
        for rank in self._group.ranks:
            self._send(rank, name=name, arguments=arguments)
        return self._answers()

    def _first(self, name: str, **arguments: Any) -> Any:
        """Ask all ranks, and return what rank 0 answers."""
        return self._ask(name, **arguments)[0]["answer"]

    def _send(self, rank: _Rank, **message: Any) -> None:
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
        waiting = {rank.channel.connection: rank for rank in self._group.ranks}
        answers: dict[int, Message] = {}
        failures: dict[int, Message] = {}
        deadline = float("inf")
        while waiting and time.monotonic() < deadline:
            self.poll()
            for connection in wait(list(waiting), _POLL_S):
                rank = waiting[cast(Connection, connection)]
                message = rank.receive()
                if "log" in message:
                    self.on_logs(LogEntry(**message["log"]))
                    continue
                del waiting[rank.channel.connection]
                (answers if "answer" in message else failures)[rank.number] = message
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            # Where it was a state that could not be written, the next request has to tell.
            self._end = self._blamed(failures)
            raise self._end
        return [answers[number] for number in sorted(answers)]

    def _blamed(self, failures: dict[int, Message]) -> RankError:
        """A rank that died takes the others with it: their errors come first and are not the cause."""
        by_time = sorted(
            failures, key=lambda number: (not failures[number]["is_dead"], failures[number]["time"])
        )
        number, num_processes = by_time[0], len(self._group.ranks)
        failure = failures[number]
        logger.warning("Rank %d of %d:\n%s", number, num_processes, failure["traceback"])
        where = f"{LOG_FOLDER}/{log_name(number)} of this site's run directory"
        return RankError(
            f"Rank {number} of {num_processes} {failure['error'].rstrip('.')}. Its log is {where}."
        )
