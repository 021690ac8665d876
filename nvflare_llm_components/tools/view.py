"""One live view of a run, from what server and sites write: round, loss, bytes, time left, per site."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from nvflare_llm_components.tensors.text import duration, printable
from nvflare_llm_components.tools.runs import (
    FINAL,
    METRICS,
    ROUNDS,
    Record,
    final_evaluation,
    having,
    latest_files,
    of_kind,
    read_lines,
)


@dataclass
class View:
    """Reads a run that goes on: a simulator workspace, a folder of startup kits, or one run directory.

    Attributes:
        folder: where the run is, or will be.
        console: gets a line for each round that is done.
        since: seconds since 1970; what was written before is of an earlier run.
    """

    folder: Path
    console: Console
    since: float = 0.0
    _told: set[str] = field(default_factory=set)

    def text(self) -> str:
        """Where the run is now, a line for the whole and one a site; prints what has come to its end."""
        rounds = self.rounds()
        sites = {self._name(file): having(read_lines(file), "round") for file in self._files(METRICS)}
        done = [(record["round"], 1, "server", _round_line(record)) for record in rounds]
        for name, records in sites.items():
            done += [
                (record["round"], 0, name, _trained_line(name, record))
                for record in having(of_kind(records, "round"), "num_steps", "train_loss")
            ]
        for number, _, who, line in sorted(done):
            self._once(f"{number} {who}", line)
        overall = "" if done and not rounds else _overall(rounds)
        lines = [overall, *(_site_line(name, records) for name, records in sites.items())]
        return "\n".join(line for line in lines if line)

    def is_over(self) -> bool:
        """Whether the last round is done, by the server's records or, where there are none, the sites'."""
        sites = [of_kind(having(read_lines(file), "round"), "round") for file in self._files(METRICS)]
        told = [self.rounds()] if self.rounds() else sites
        return bool(told) and all(
            records and records[-1]["round"] + 1 == records[-1].get("num_rounds") for records in told
        )

    def final(self) -> Record:
        """What the sites found of the last model: ``eval_loss``, by site in ``sites``; empty for nothing."""
        return next((final_evaluation(file) for file in self._files(FINAL)), {})

    def model_record(self) -> Path:
        """The record beside the last global model's weights; it may not be there."""
        server = next((file.parent for file in self._files(ROUNDS)), self.folder)
        return server / "global_model/last/federation.json"

    def losses(self) -> list[float]:
        """Mean eval loss of the global model before each round."""
        losses = [record.get("eval_loss") for record in self.rounds()]
        return [loss for loss in losses if loss is not None]

    def course(self) -> list[float]:
        """The same, and what the sites found of the last model."""
        final = self.final().get("eval_loss")
        return [*self.losses(), *([] if final is None else [final])]

    def rounds(self) -> list[Record]:
        """What the server recorded of each round that is done."""
        return [record for file in self._files(ROUNDS) for record in having(read_lines(file), "round")]

    def _once(self, key: str, line: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self.console.print(line, highlight=False, markup=False)

    def _files(self, name: str) -> list[Path]:
        return latest_files(self.folder, name, self.since)

    def _name(self, file: Path) -> str:
        return printable(file.parents[1].name or file.parent.name, 200)


def watch(folder: Path, console: Console, every_s: float = 1.0) -> None:
    """Shows a run until its last round is done, or the user ends it.

    Args:
        folder: see :class:`View`.
        console: where to show it.
        every_s: seconds between two looks.
    """
    view = View(folder, console)
    with console.status("") as status:
        while not view.is_over():
            status.update(Text(view.text()))
            time.sleep(every_s)
        view.text()


def _overall(rounds: list[Record]) -> str:
    if not rounds:
        return "No round is done yet."
    last = rounds[-1]
    left = (last.get("num_rounds") or 0) - last["round"] - 1
    sent, received = (sum(record.get(key, 0) for record in rounds) for key in ("bytes_out", "bytes_in"))
    time_left = f", about {duration(left * last.get('seconds', 0.0))} left" if left > 0 else ""
    return f"{len(rounds)} rounds done{time_left}; {decimal(sent)} out, {decimal(received)} in"


def _round_line(record: Record) -> str:
    loss = record.get("eval_loss")
    told = f"eval loss {loss:.4f} before it, " if loss is not None else ""
    missing = f", without {', '.join(record['missing'])}" if record.get("missing") else ""
    moved = decimal(record.get("bytes_out", 0) + record.get("bytes_in", 0))
    of_all = f" of {record['num_rounds']}" if record.get("num_rounds") else ""
    return (
        f"round {record['round'] + 1}{of_all}: {told}{moved}, {duration(record.get('seconds', 0.0))}{missing}"
    )


def _trained_line(name: str, record: Record) -> str:
    told = f"{record['num_steps']} steps, loss {record['train_loss']:.3f}"
    return f"  {name:10} round {record['round'] + 1}: {told}"


def _site_line(name: str, records: list[Record]) -> str:
    steps = having(of_kind(records, "train"), "step", "loss")
    evals = having(of_kind(records, "eval"), "eval_loss")
    if not steps and not evals:
        return f"  {name:10} starts"
    loss = f"step {steps[-1]['step']}, loss {steps[-1]['loss']:.2f}" if steps else "evaluates"
    seen = f", eval loss {evals[-1]['eval_loss']:.3f}" if evals else ""
    return f"  {name:10} round {records[-1]['round'] + 1}, {loss}{seen}"
