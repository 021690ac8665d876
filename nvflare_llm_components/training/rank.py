"""One of the processes that train a site's model together: ``python -m ...rank DESCRIPTOR``.

Nothing here waits for the site's front end inside a collective, and there is no thread: parked is waiting for
the next request. A rank ends with its front end at once, parked or busy.
"""

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.safetensors_file import DTYPE_NAMES, map_tensor_file
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.training import weights
from nvflare_llm_components.training.broadcast import Broadcast
from nvflare_llm_components.training.build import epoch_rows_of
from nvflare_llm_components.training.channel import Channel, ChannelClosedError
from nvflare_llm_components.training.engine import LogEntry, RoundOrder, TrainingEngine
from nvflare_llm_components.training.image import TensorImage
from nvflare_llm_components.training.settings import TrainingSettings


class Rank:
    """Serves the front end's requests between rounds.

    Args:
        channel: To the front end.
        engine: This process's training.
        number: This rank's number; 0 speaks for all where all have the same to say.
        spans_nodes: Whether some ranks are on another machine than the front end, and its images.
    """

    def __init__(self, channel: Channel, engine: TrainingEngine, number: int, spans_nodes: bool):
        self._channel, self._engine, self._is_first = channel, engine, number == 0
        self._spans_nodes = spans_nodes
        self._image: TensorImage | None = None
        if self._is_first:
            engine.on_logs = self._log

    def run(self) -> None:
        """Serve, and train, until the front end is gone."""
        start = self._serve(self._facts())
        self._engine.run(**start, pause=self._pause)

    def _pause(self) -> None:
        self._engine.order = RoundOrder(**self._serve({}))

    def _serve(self, answer: Any) -> dict[str, Any]:
        """Give the answer to what was asked last, and serve until the training is to go on."""
        while True:
            self._channel.die_with_partner(False)
            self._channel.send(answer=answer, step=self._engine.step, counts=asdict(self._engine.counts))
            request = self._channel.receive()
            self._channel.die_with_partner(True)
            self._drop_image()  # the front end has mapped it
            name, arguments = request["name"], request["arguments"]
            if name == "go_on":
                return dict(arguments)
            actions: dict[str, Callable[..., Any]] = {
                "load": self._load,
                "snapshot": self._snapshot,
                "evaluate": self._engine.evaluate,
                "write_state": self._write_state,
                "save_model": self._save_model,
            }
            answer = actions[name](**arguments)

    def _facts(self) -> dict[str, Any]:
        layout = weights.layout_of(self._engine.trainer.model)
        rows = epoch_rows_of(self._engine.trainer)
        return {
            "rows": asdict(rows) if rows else None,
            "has_eval_data": self._engine.has_eval_data,
            "steps_per_epoch": self._engine.steps_per_epoch,
            "further_names": weights.further_names(self._engine.trainer.model),
            "layout": [(name, shape, DTYPE_NAMES[dtype]) for name, (shape, dtype) in layout.items()],
        }

    def _load(self, image: str) -> str:
        if not self._spans_nodes:
            return self._engine.load(map_tensor_file(Path(image)))
        layout = weights.layout_of(self._engine.trainer.model)
        return self._engine.load(Broadcast(layout, map_tensor_file(Path(image)) if self._is_first else {}))

    def _snapshot(self) -> str | None:
        model = self._engine.trainer.model
        layout = weights.layout_of(model)
        values = weights.stream(model, layout)
        if self._is_first:
            self._image = TensorImage(layout, values)
            return self._image.path
        if self._engine.is_sharded:
            deque(values, maxlen=0)  # each process gives its part
        return None

    def _write_state(self, folder: str) -> None:
        self._engine.write_state(Path(folder))

    def _save_model(self, folder: str) -> None:
        if self._is_first or self._engine.is_sharded:
            self._engine.save_model(Path(folder))

    def _drop_image(self) -> None:
        image, self._image = self._image, None
        if image:
            image.close()

    def _log(self, entry: LogEntry) -> None:
        # Room that comes free in a full socket would raise the signal as well.
        self._channel.die_with_partner(False)
        self._channel.send(log=asdict(entry))
        self._channel.die_with_partner(True)


def join_group(rendezvous: str, number: int, settings: TrainingSettings) -> None:
    """Meet the other ranks: in a file of a folder that only this user can open, or at an address."""
    if settings.is_on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    host, _, port = rendezvous.rpartition(" ")
    meeting: dict[str, Any] = {"init_method": None, "store": None}
    if Path(rendezvous).is_absolute():
        meeting["init_method"] = Path(rendezvous).as_uri()
    else:
        # Nothing is asked for there; accelerate wants to see them where there are several machines.
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)
        meeting["store"] = distributed.TCPStore(host, int(port), is_master=False)  # type: ignore[attr-defined]
    distributed.init_process_group(
        _backend(settings), rank=number, world_size=int(settings.num_processes), **meeting
    )


def _backend(settings: TrainingSettings) -> str:
    if settings.is_offloaded:
        return "cpu:gloo,cuda:nccl"  # norms of gradients that lie in the machine's memory
    return "nccl" if settings.is_on_gpu else "gloo"


def train(channel: Channel) -> None:
    """Build this rank's training as the front end says, and serve."""
    start = channel.receive()
    channel.die_with_partner(True)
    number, num_processes = start["number"], start["num_processes"]
    settings = TrainingSettings.from_json(start["settings"])
    join_group(start["rendezvous"], number, settings)
    saved = Path(start["saved"]) if start["saved"] else None
    engine = TrainingEngine(settings, Path(start["folder"]), saved)
    found = engine.trainer.args.world_size
    if found != num_processes:
        raise RuntimeError(
            f"num_processes: expected {num_processes} processes to train as one, found {found}."
        )
    Rank(channel, engine, number, start["spans_nodes"]).run()


def main(descriptor: int) -> int:
    """Returns the exit status; 0 where the front end is gone, or has no more to ask."""
    channel = Channel(descriptor)
    try:
        train(channel)
    except ChannelClosedError:
        return 0
    except BaseException as error:
        traceback.print_exc()
        with suppress(ChannelClosedError):
            channel.die_with_partner(False)
            channel.send(
                error=f"failed: {_told(error)}",
                traceback=_trace(error),
                time=time.monotonic(),
                is_dead=False,
            )
        return 1
    return 0


def _told(error: BaseException) -> str:
    """What may leave the site: the text of our errors; of a library's, which may quote a row, the type."""
    kind = type(error).__name__
    if isinstance(error, ReportableError):
        return f"{kind}: {printable(error, 1000)}"
    package = Path(__file__).parents[1]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if package in Path(frame.filename).parents
    ]
    return (
        f"{kind} at {Path(frames[-1].filename).relative_to(package.parent)}:{frames[-1].lineno}"
        if frames
        else kind
    )


def _trace(error: BaseException) -> str:
    """For this site's own log; what came from outside can forge no line of it."""
    return "".join(
        [*traceback.format_tb(error.__traceback__), f"{type(error).__name__}: {printable(error, 4000)}"]
    )


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # The usual way out waits for ranks that may be gone.
    os._exit(status)
