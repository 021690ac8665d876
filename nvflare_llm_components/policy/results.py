"""What a server accepts of a site's result: pure checks, before anything of it is averaged.

A result is held against the server's own model and the job's settings, never against the result that came
first. What is refused here costs its site the round, and nobody else.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from nvflare_llm_components.policy.schema import Names, PolicyError, number, refuse_unlisted
from nvflare_llm_components.tensors.blocks import blocks_of
from nvflare_llm_components.tensors.convert import as_tensor, materialize_of, materialized
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.finite import count_nonfinite, ends_of
from nvflare_llm_components.tensors.lazy import LazyValue
from nvflare_llm_components.tensors.names import normalised
from nvflare_llm_components.tensors.text import listed, printable
from nvflare_llm_components.tensors.threads import undivided

WEIGHTS, WEIGHT_DIFF = "WEIGHTS", "WEIGHT_DIFF"
MAX_WEIGHT = 1e9
"""Of the average, where the job sets none: more examples, or tokens, than a site trains on in a round."""
MOST_WEIGHT = 1e15
"""What a job may set it to."""
MAX_MAGNITUDE = 1e9
"""Of a tensor's values. Far beyond any trained weight, and times all sites' weights still within float32."""
MAX_METRICS = 64
MAX_METRIC_NAME = 100
MAX_METRIC = 1e12
MAX_LOSS = 1e4
"""Of a metric that is called a loss, and its least is 0: a cross-entropy is not negative."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SETTINGS = {
    "data_kind": Literal[WEIGHTS, WEIGHT_DIFF],
    "max_weight": number(1e-9, MOST_WEIGHT),
    "equal_weights": bool,
    "also_meta": Names,
}


@dataclass(frozen=True)
class ExpectedTensors:
    """The server's model.

    Attributes:
        specs: shape and dtype by name; a tied weight stands once.
        aliases: further names of tied weights, to the name in `specs`.
    """

    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ResultRules:
    """What the job says of its results.

    Attributes:
        data_kind: "WEIGHTS" or "WEIGHT_DIFF"; None where the job does not say.
        max_weight: largest weight in the average, in the unit that the sites count in: examples.
        equal_weights: every result counts the same, whatever its site says.
        also_meta: keys of a result's meta that stay, beside the weight and the metrics.
    """

    data_kind: str | None = None
    max_weight: float = MAX_WEIGHT
    equal_weights: bool = False
    also_meta: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> "ResultRules":
        """The rules in a job's settings.

        Raises:
            PolicyError: for a setting that there is not, or out of its range.
        """
        refuse_unlisted("results", settings or {}, _SETTINGS)
        given = {key: value for key, value in (settings or {}).items() if value is not None}
        return cls(**given | {"also_meta": tuple(given.get("also_meta", ()))})


def checked_meta(
    meta: Mapping[str, Any], rules: ResultRules, weight_key: str, metrics_key: str
) -> dict[str, Any]:
    """The meta of a result as it may reach the average: an allow-list of keys, each with its range.

    Other keys are left out: FLARE's aggregators take orders from some of them.

    Raises:
        PolicyError: naming what was expected and what was found.
    """
    kept = {key: meta[key] for key in rules.also_meta if key in meta}
    if rules.equal_weights:
        kept[weight_key] = 1
    elif weight_key in meta:
        kept[weight_key] = checked_weight(meta[weight_key], rules.max_weight)
    if meta.get(metrics_key) is not None:
        kept[metrics_key] = checked_metrics(meta[metrics_key])
    return kept


def checked_weight(weight: object, max_weight: float) -> int | float:
    """A result's weight in the average, as it is.

    Raises:
        PolicyError: unless it is a finite number above 0, up to `max_weight`.
    """
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 < weight <= max_weight:  # type: ignore[operator]
        raise PolicyError(
            f"expected a weight above 0 and up to {max_weight:g} in the average, "
            f"found {printable(repr(weight), 60)}. Where it is honest, raise results.max_weight of the "
            "persistor; with results.equal_weights the sites' own numbers do not matter"
        )
    return weight  # type: ignore[return-value]


def checked_metrics(metrics: object) -> dict[str, float]:
    """A result's metrics as floats.

    Raises:
        PolicyError: unless they are few finite numbers with short names; a loss from 0 to 10,000.
    """
    if not isinstance(metrics, Mapping) or len(metrics) > MAX_METRICS:
        found = f"{len(metrics)}" if isinstance(metrics, Mapping) else type(metrics).__name__
        raise PolicyError(f"expected up to {MAX_METRICS} metrics by name, found {found}")
    return {_checked_name(name): _checked_metric(name, value) for name, value in metrics.items()}


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_METRIC_NAME or not name.isprintable():
        raise PolicyError(
            f"expected printable names of metrics of up to {MAX_METRIC_NAME} characters, "
            f"found {printable(repr(name), 60)}"
        )
    return name


def _checked_metric(name: str, value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    low, high = (0.0, MAX_LOSS) if "loss" in name.lower() else (-MAX_METRIC, MAX_METRIC)
    if not is_number or not low <= value <= high:  # type: ignore[operator]
        raise PolicyError(
            f"expected metric '{name}' to be a number from {low:g} to {high:g}, "
            f"found {printable(repr(value), 60)}"
        )
    return float(value)  # type: ignore[arg-type]


def checked_kind(kind: object, expected: str) -> None:
    """Raise PolicyError unless a result's data are of the kind that the job averages."""
    if kind != expected:
        raise PolicyError(
            f"expected data kind {expected}, found {printable(repr(kind), 60)}. Give all sites the same "
            "params_type; where the server cannot see it in the job's client configuration, set "
            "results.data_kind of the persistor"
        )


def checked_tensors(
    values: Mapping[str, Any], expected: ExpectedTensors, is_summed: bool = True
) -> dict[str, Any]:
    """A result's tensors in the order of the server's model; lazy ones stay lazy.

    A lazy value is decoded to be looked at, a block at a time. FLARE's aggregators sum in the dtype of the
    result that arrives first: what is summed is widened to float32 here, so that no site chooses it.

    Args:
        values: tensors, arrays, or lazy values by name.
        expected: the server's model.
        is_summed: whether the values are for a sum, or stored as they are.

    Raises:
        PolicyError: naming the first tensor that is missing, unknown, or not what it must be.
    """
    specs = expected.specs
    try:
        values = normalised(values, specs.keys(), expected.aliases)
    except CheckpointError as error:
        raise PolicyError(str(error).rstrip(".")) from error
    missing = [name for name in specs if name not in values]
    unknown = [name for name in values if name not in specs]
    for names, what in ((missing, "missing"), (unknown, "unknown")):
        if names:
            raise PolicyError(
                f"expected the {len(specs)} tensors of the global model, found {len(names)} {what} "
                f"({listed([printable(name, 80) for name in names])})"
            )
    return undivided(
        lambda: {name: _checked_tensor(name, values[name], *spec, is_summed) for name, spec in specs.items()}
    )


def _checked_tensor(
    name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, is_summed: bool
) -> Any:
    _check_shape(name, getattr(value, "shape", shape), shape)  # before a lazy value is decoded
    tensor = value if isinstance(value, LazyValue) else as_tensor(materialized(value))
    if tensor is None:
        raise PolicyError(f"expected {name} to be a tensor, found {type(value).__name__}")
    _check_shape(name, tensor.shape, shape)
    if tensor.dtype not in _FLOATS if dtype.is_floating_point else tensor.dtype != dtype:
        raise PolicyError(f"expected {name} in {dtype}, found {tensor.dtype}")
    if not dtype.is_floating_point:
        return value
    _check_values(name, tensor)
    wide = torch.promote_types(dtype, torch.float32)
    return _widened(value, wide) if is_summed and tensor.dtype != wide else value


def _check_shape(name: str, found: Sequence[int], expected: tuple[int, ...]) -> None:
    if tuple(found) != expected:
        raise PolicyError(f"expected {name} of shape {expected}, found {printable(tuple(found), 60)}")


def _check_values(name: str, values: torch.Tensor | LazyValue) -> None:
    ends, num_missing = [], values.shape.numel()
    for block in blocks_of(values):
        ends.append(ends_of(block))
        num_missing -= block.numel()
    if num_missing:
        raise PolicyError(f"expected {values.shape.numel()} values in {name}, found {-num_missing:+} of them")
    low, high = (float(end) for end in torch.aminmax(torch.tensor(ends or [(0.0, 0.0)], dtype=torch.float64)))
    if not math.isfinite(low) or not math.isfinite(high):
        count = sum(map(count_nonfinite, blocks_of(values)))
        raise PolicyError(
            f"expected finite values, found NaN or Inf in {name}: {count} of {values.shape.numel()} values. "
            "Lower the learning rate, or send in bf16 instead of fp16"
        )
    if max(-low, high) > MAX_MAGNITUDE:
        raise PolicyError(
            f"expected values up to {MAX_MAGNITUDE:g} in {name}, found {max(low, high, key=abs):.3g}"
        )


class Widened(LazyValue):
    """A lazy value that decodes into a wider dtype.

    Args:
        value: what it decodes.
        dtype: of the decoded tensor.
    """

    def __init__(self, value: object, dtype: torch.dtype) -> None:
        self._value, self._dtype = value, dtype

    def materialize(self) -> torch.Tensor:
        """Decode into a new tensor."""
        tensor = as_tensor(materialized(self._value))
        assert tensor is not None, "was checked"
        return tensor.to(self._dtype)

    def blocks(self) -> Iterator[torch.Tensor]:
        """See :class:`LazyValue`."""
        return (block.to(self._dtype) for block in blocks_of(self._value))

    @property
    def shape(self) -> torch.Size:
        """See :class:`LazyValue`; a value that does not tell its shape is decoded for it."""
        shape = getattr(self._value, "shape", None)
        return self.materialize().shape if shape is None else torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`LazyValue`."""
        return self._dtype


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if materialize_of(value) or _is_mapped(value):
        return Widened(value, dtype)
    if isinstance(value, np.ndarray):
        return value.astype(str(dtype).removeprefix("torch."))
    return value.to(dtype)


def _is_mapped(value: Any) -> bool:
    """Whether a tensor lies in a file: it waits there so as to take no memory."""
    return isinstance(value, torch.Tensor) and value.untyped_storage().filename is not None
