"""An average that does not depend on the order in which results arrive."""

from typing import Any

import torch
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants

_WEIGHT, _SITE = "NUM_STEPS_CURRENT_ROUND", "client_name"


class OrderedAverage(ModelAggregator):
    """FedAvg's weighted mean, summed in the order of the sites' names: the same bits in every run.

    FLARE's own helper sums results as they arrive, so two runs of a job may differ in the last bit, and it
    multiplies one site's values by the site's weight and divides again. Here each weight is divided by their
    sum first: one site alone gets its own values back, exactly. The price is that results wait for the last
    one; with `PrecisionDequantizeFilter` they wait as they were sent, and are decoded one tensor at a time.

    Use it as `aggregator` of `nvflare.app_common.workflows.fedavg.FedAvg`.
    Formula: McMahan et al., https://arxiv.org/abs/1602.05629, algorithm 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[str, FLModel] = {}

    def accept_model(self, model: FLModel) -> None:
        """Keep one site's result for the average.

        Args:
            model: whole weights or differences, and their weight in `NUM_STEPS_CURRENT_ROUND` (1 if missing).
        """
        self._results[str(model.meta.get(_SITE))] = model

    def aggregate_model(self) -> FLModel:
        """Return the weighted mean of what was accepted, in float32; nothing is kept.

        Raises:
            ValueError: no site sent a result, or a site's tensors are not those of the others.
        """
        sites = sorted(self._results)
        if not sites:
            raise ValueError("OrderedAverage: expected a result from at least one site, found none.")
        results = [self._results[site] for site in sites]
        _check_names(sites, results)
        weights = [float(result.meta.get(_WEIGHT, 1.0)) for result in results]
        shares = [weight / sum(weights) for weight in weights]
        params = {
            name: _mean([r.params[name] for r in results], shares) for name in sorted(results[0].params)
        }
        metrics = _mean_metrics([result.metrics or {} for result in results], shares)
        params_type = results[0].params_type
        self.fl_ctx.set_prop(
            AppConstants.AGGREGATION_STATS, {"contributors": sites}, private=True, sticky=True
        )
        self.reset_stats()
        return FLModel(params=params, params_type=params_type, metrics=metrics or None)

    def reset_stats(self) -> None:
        """Forget what was accepted."""
        self._results = {}


def _mean(values: list[Any], shares: list[float]) -> torch.Tensor:
    total = _tensor(values[0]) * shares[0]
    for value, share in zip(values[1:], shares[1:], strict=True):
        total += _tensor(value) * share
    return total


def _tensor(value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(value.materialize() if hasattr(value, "materialize") else value)
    return tensor.to(torch.float32)


def _mean_metrics(metrics: list[dict[str, Any]], shares: list[float]) -> dict[str, float]:
    """The mean of each metric that every site reports."""
    names = set.intersection(*(set(site) for site in metrics))
    return {
        name: sum(share * float(site[name]) for site, share in zip(metrics, shares, strict=True))
        for name in sorted(names)
    }


def _check_names(sites: list[str], results: list[FLModel]) -> None:
    expected = results[0].params.keys()
    for site, result in zip(sites[1:], results[1:], strict=True):
        if different := sorted(expected ^ result.params.keys()):
            raise ValueError(
                f"OrderedAverage: expected the {len(expected)} tensors of '{sites[0]}' from '{site}', "
                f"found {len(different)} that only one of them has ({', '.join(different[:5])}). "
                "Give all sites the same model and peft_config."
            )
