"""By what number models are compared: the job's key metric, in which more or less is better."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class KeyMetric:
    """A metric by its name; `mode` is "min" where lower is better, "max" otherwise."""

    name: str = "eval_loss"
    mode: str = "min"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "KeyMetric":
        """The one that a model's record names; of older releases' records, the default."""
        found = record.get("key_metric") or {}
        return cls(str(found["name"]), str(found.get("mode", "max"))) if "name" in found else cls()

    def is_better(self, value: float, than: float) -> bool:
        """Whether one value is better than another one; NaN never is."""
        return value < than if self.mode == "min" else value > than

    def record(self) -> dict[str, str]:
        """For a model's record."""
        return asdict(self)


def means_of(by_site: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over sites of those metrics that all sites report.

    >>> means_of({"a": {"loss": 1.0, "accuracy": 0.5}, "b": {"loss": 2.0}})
    {'loss': 1.5}
    """
    shared = set.intersection(*map(set, by_site.values())) if by_site else set()
    return {
        name: math.fsum(metrics[name] for metrics in by_site.values()) / len(by_site)
        for name in sorted(shared)
    }
