"""Averages of the sites' results that do not depend on the order in which they arrive.

Each waits for all results of a round and combines them tensor by tensor. They wait as they were sent, where
`PrecisionDequantizeFilter` is in the job, or on disk with FLARE's `enable_tensor_disk_offload`.
"""

import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from nvflare_llm_components.averages import (
    Blocks,
    clip_factors,
    clipped_mean,
    coordinate_median,
    trimmed_mean,
    weighted_mean,
)
from nvflare_llm_components.flare.headers import round_of
from nvflare_llm_components.flare.peers import sender_of
from nvflare_llm_components.policy.results import MOST_WEIGHT, checked_weight
from nvflare_llm_components.tensors.convert import shape_of
from nvflare_llm_components.tensors.lazy import Deferred
from nvflare_llm_components.tensors.norm import distance

_WEIGHT, _SITE = "NUM_STEPS_CURRENT_ROUND", "client_name"


class CollectingAggregator(ModelAggregator):
    """Collects a round's results, then combines them tensor by tensor, in the order of the sites' names.

    Attributes:
        lazy_shapes: shapes by name of the tensors whose average is made only when it is asked for, until
            then it holds the results; set by a controller whose persistor saves such values. Others are made
            at once.
    """

    def __init__(self) -> None:
        super().__init__()
        FLComponent.__init__(self)  # FLARE's own leaves out the logger
        self.lazy_shapes: Mapping[str, Sequence[int]] = {}
        self._results: dict[str, FLModel] = {}

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Keep a site's first result of this round; what FLARE's ScatterAndGather calls."""
        self.fl_ctx = fl_ctx
        site = sender_of(shareable) or shareable.get_peer_prop(ReservedKey.IDENTITY_NAME, None)
        number, current_round = round_of(shareable), fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        # FLARE hands over late results, too, and those of tasks that it does not know.
        is_late = None not in (number, current_round) and number != current_round
        if is_late or str(site) in self._results:
            return False
        model = FLModelUtils.from_shareable(shareable)
        model.meta[_SITE] = site
        self.accept_model(model)
        return True

    def accept_model(self, model: FLModel) -> None:
        """Keep one site's result for the average.

        Args:
            model: whole weights or differences, and their weight in `NUM_STEPS_CURRENT_ROUND` (1 if missing).

        Raises:
            PolicyError: for a weight that is none; the result is not kept.
        """
        checked_weight(model.meta.get(_WEIGHT, 1.0), MOST_WEIGHT)
        self._results[str(model.meta.get(_SITE))] = model

    def aggregate_model(self) -> FLModel:
        """Return the average of what was accepted, in float32; nothing is kept.

        Raises:
            ValueError: no site sent a result, or a site's tensors are not those of the others.
        """
        if not self._results:
            raise ValueError(f"{type(self).__name__}: expected a result from at least one site, found none.")
        results = self._chosen(dict(sorted(self._results.items())))
        first = next(iter(results.values()))
        _check_alike(type(self).__name__, results)
        shares = _shares(list(results.values()))
        self._prepare(list(results.values()))
        params = {
            name: self._average(name, [r.params[name] for r in results.values()], shares)
            for name in sorted(first.params)
        }
        metrics = _mean_metrics([result.metrics or {} for result in results.values()], shares)
        stats = {"contributors": list(results)}
        self.fl_ctx.set_prop(AppConstants.AGGREGATION_STATS, stats, private=True, sticky=True)
        self.reset_stats()
        return FLModel(params=params, params_type=first.params_type, metrics=metrics or None)

    def reset_stats(self) -> None:
        """Forget what was accepted."""
        self._results = {}

    def _chosen(self, results: dict[str, FLModel]) -> dict[str, FLModel]:
        return results

    def _prepare(self, results: list[FLModel]) -> None:
        """Look at whole results before they are combined."""

    def _average(self, name: str, values: list[Any], shares: Sequence[float]) -> torch.Tensor | Deferred:
        shape = self.lazy_shapes[name] if name in self.lazy_shapes else shape_of(values[0])
        average = Deferred(lambda: self._combined(name, values, shares), shape, torch.float32)
        return average if name in self.lazy_shapes else average.materialize()

    @abstractmethod
    def _combined(self, name: str, values: list[Any], shares: Sequence[float]) -> Blocks:
        """The average of one tensor, block by block."""

    def _norms(self, results: Sequence[FLModel]) -> list[float]:
        centre = self._centre(results[0])
        return [distance(result.params, centre or {}) for result in results]

    def _centre(self, result: FLModel) -> Mapping[str, Any] | None:
        """What updates are measured from: nothing for differences, else the model that the sites trained."""
        if result.params_type == ParamsType.DIFF:
            return None
        with self.fl_ctx.get_engine().new_context() as fl_ctx:
            model = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
        weights: Mapping[str, Any] = model[ModelLearnableKey.WEIGHTS]
        return weights


class OrderedAverage(CollectingAggregator):
    """FedAvg's weighted mean, summed in the order of the sites' names: the same bits in every run.

    FLARE's own helper sums results as they arrive, so two runs of a job may differ in the last bit, and it
    multiplies one site's values by the site's weight and divides again. Here each weight is divided by their
    sum first: one site alone gets its own values back, exactly. A block of each result at a time is decoded.

    Use it as `aggregator` of `nvflare.app_common.workflows.fedavg.FedAvg`.
    Formula: McMahan et al., https://arxiv.org/abs/1602.05629, algorithm 1.
    """

    def __init__(self, *, max_norm_ratio: float | None = None) -> None:
        """Store the setting.

        Args:
            max_norm_ratio: a result whose update is more than so many times as long as the median of all is
                left out of its round, and its site named; None for no such limit.
        """
        super().__init__()
        self.max_norm_ratio = max_norm_ratio

    def _chosen(self, results: dict[str, FLModel]) -> dict[str, FLModel]:
        if self.max_norm_ratio is None:
            return results
        _check_alike(type(self).__name__, results)
        norms = dict(zip(results, self._norms(list(results.values())), strict=True))
        limit = self.max_norm_ratio * statistics.median(norms.values())
        for site, norm in norms.items():
            if not norm <= limit:
                self.warning(
                    f"Site '{site}' is left out: its update's norm is {norm:.4g}, above {limit:.4g}."
                )
        return {site: result for site, result in results.items() if norms[site] <= limit}

    def _combined(self, name: str, values: list[Any], shares: Sequence[float]) -> Blocks:
        return weighted_mean(values, shares)


class TrimmedMean(CollectingAggregator):
    """The mean of each weight without its largest and smallest values: it withstands so many hostile sites.

    All sites count the same.
    Formula: Yin et al., https://arxiv.org/abs/1803.01498, definition 2.
    """

    def __init__(self, *, num_trimmed: int = 1) -> None:
        """Store the setting.

        Args:
            num_trimmed: values left out at each end; a round needs more than twice as many results.
        """
        super().__init__()
        self.num_trimmed = num_trimmed

    def _combined(self, name: str, values: list[Any], shares: Sequence[float]) -> Blocks:
        return trimmed_mean(values, self.num_trimmed)


class CoordinateMedian(CollectingAggregator):
    """The median of each weight: withstands all but half of the sites, and moves less than a mean.

    All sites count the same.
    Formula: Yin et al., https://arxiv.org/abs/1803.01498, definition 1.
    """

    def _combined(self, name: str, values: list[Any], shares: Sequence[float]) -> Blocks:
        return coordinate_median(values)


class NormClippedMean(CollectingAggregator):
    """The weighted mean of updates of which none is longer than a limit: no site moves the model far.

    Whole weights are taken as updates of the round's global model. Results are decoded twice.
    Formula: Sun et al., https://arxiv.org/abs/1911.07963, section 4.
    """

    def __init__(self, *, max_norm: float | None = None) -> None:
        """Store the setting.

        Args:
            max_norm: longest update, as the Euclidean norm of all weights; None is each round's median.
        """
        super().__init__()
        self.max_norm = max_norm
        self._factors: list[float] = []
        self._origin: Mapping[str, Any] | None = None

    def _prepare(self, results: list[FLModel]) -> None:
        self._origin = self._centre(results[0])
        self._factors = clip_factors(self._norms(results), self.max_norm)

    def _combined(self, name: str, values: list[Any], shares: Sequence[float]) -> Blocks:
        return clipped_mean(values, shares, self._factors, self._origin[name] if self._origin else None)


def _shares(results: Sequence[FLModel]) -> list[float]:
    weights = [float(result.meta.get(_WEIGHT, 1.0)) for result in results]
    return [weight / sum(weights) for weight in weights]


def _mean_metrics(metrics: list[dict[str, Any]], shares: list[float]) -> dict[str, float]:
    """The mean of each metric that every site reports."""
    names = set.intersection(*(set(site) for site in metrics))
    return {
        name: sum(share * float(site[name]) for site, share in zip(metrics, shares, strict=True))
        for name in sorted(names)
    }


def _check_alike(who: str, results: Mapping[str, FLModel]) -> None:
    """Raise unless all results have the same kind of data and the same names."""
    (one, first), *others = results.items()
    for site, result in others:
        if different := sorted(first.params.keys() ^ result.params.keys()):
            raise ValueError(
                f"{who}: expected the {len(first.params)} tensors of '{one}' from '{site}', "
                f"found {len(different)} that only one of them has ({', '.join(different[:5])}). "
                "Give all sites the same model and peft_config."
            )
        if result.params_type != first.params_type:
            raise ValueError(
                f"{who}: expected {first.params_type} from '{site}', as from '{one}', found "
                f"{result.params_type}. Give all sites the same params_type."
            )
