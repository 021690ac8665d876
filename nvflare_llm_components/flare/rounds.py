"""What the server knows of a round: a record for files and monitors, a sentence for people."""

import time
from dataclasses import dataclass, field
from typing import Any

from nvflare_llm_components.tensors.text import duration

ROUND_RECORD = "nvflare_llm_round_record"
"""Property of the FLContext: what `RoundLog` knows of the round whose model is about to be saved."""


@dataclass
class Round:
    """A round as the server sees it.

    Attributes:
        job_id: of this run; a run that continues it has another one.
        number: of the round, from 0.
        num_rounds: number of the last round and one; None where the workflow does not tell.
        asked: sites of the job.
        results: accepted results by site: weight, metrics, and seconds from its task to its result.
        phases: seconds by phase: until the last result, averaging, saving.
        bytes_out: sent to sites, on the wire.
        bytes_in: received from sites, on the wire.
        seconds: from its start to its saved model.
    """

    job_id: str
    number: int
    num_rounds: int | None
    asked: list[str]
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    bytes_out: int = 0
    bytes_in: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    _given: dict[str, float] = field(default_factory=dict)

    def give(self, site: str) -> None:
        """A site is given its task; where it asks again, the first time counts."""
        self._given.setdefault(site, time.monotonic())

    def accept(self, site: str, facts: dict[str, float]) -> None:
        """A site's result counts; `facts` are its weight and metrics."""
        since = self._given.get(site, self.started)
        self.results[site] = facts | {"seconds": round(time.monotonic() - since, 3)}

    def end_phase(self, name: str) -> None:
        """What began with the end of the last phase is over."""
        self.phases[name] = round(time.monotonic() - self.started - sum(self.phases.values()), 3)

    @property
    def missing(self) -> list[str]:
        """Sites of the job without an accepted result."""
        return [site for site in self.asked if site not in self.results]

    def mean(self, metric: str) -> float | None:
        """Mean of a metric over the sites that report it, by the weights of their results; None for none."""
        told = [(site.get("weight", 1.0), site[metric]) for site in self.results.values() if metric in site]
        total = sum(weight for weight, _ in told)
        return sum(weight * value for weight, value in told) / total if total > 0 else None

    def record(self) -> dict[str, Any]:
        """A line of ``rounds.jsonl``; bytes and seconds as in the attributes."""
        return {
            "job_id": self.job_id,
            "round": self.number,
            "num_rounds": self.num_rounds,
            "eval_loss": self.mean("eval_loss"),
            "train_loss": self.mean("train_loss"),
            "sites": self.results,
            "missing": self.missing,
            "bytes_out": self.bytes_out,
            "bytes_in": self.bytes_in,
            "seconds": round(self.seconds, 3),
            "seconds_by_phase": self.phases,
            "time": time.time(),
        }

    def gauges(self) -> dict[str, float]:
        """The round in numbers, by name; what no site tells is not there."""
        told: dict[str, float | None] = {
            "round": self.number,
            "sites": len(self.results),
            "missing": len(self.missing),
            "eval_loss": self.mean("eval_loss"),
            "train_loss": self.mean("train_loss"),
            "bytes_out": self.bytes_out,
            "bytes_in": self.bytes_in,
            "seconds": self.seconds,
            **{f"seconds_{phase}": seconds for phase, seconds in self.phases.items()},
        }
        return {name: value for name, value in told.items() if value is not None}

    def sentence(self, earlier_loss: float | None) -> str:
        """The round in one line; `earlier_loss` is the last round's eval loss, for the change."""
        of_all = f" of {self.num_rounds}" if self.num_rounds else ""
        parts = [f"Round {self.number + 1}{of_all}: {len(self.results)} of {len(self.asked)} sites"]
        if self.missing:
            parts.append(f"missing {', '.join(self.missing)}")
        loss = self.mean("eval_loss")
        if loss is not None:
            change = "" if earlier_loss is None else f" ({loss - earlier_loss:+.4f})"
            parts.append(f"eval loss {loss:.4f}{change} before it")
        parts.append(f"{_size(self.bytes_out)} out, {_size(self.bytes_in)} in, {duration(self.seconds)}")
        left = (self.num_rounds or 0) - self.number - 1
        if left > 0:
            parts.append(f"about {duration(left * self.seconds)} left")
        return ", ".join(parts)


def _size(num_bytes: float) -> str:
    """Bytes in decimal units.

    >>> _size(999), _size(1_023_680), _size(4_943_257_600)
    ('999 B', '1.0 MB', '4.9 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"
