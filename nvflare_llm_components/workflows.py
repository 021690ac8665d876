"""FLARE's FedAvg for federations whose sites fall away and come back, and the last model's evaluation."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from nvflare.apis.controller_spec import TaskCompletionStatus
from nvflare.apis.dxo import MetaKey
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_common.workflows.model_controller import ModelController

from nvflare_llm_components.aggregators import CollectingAggregator, OrderedAverage
from nvflare_llm_components.flare.headers import error_of
from nvflare_llm_components.flare.messages import run_dir_of
from nvflare_llm_components.flare.peers import inside_only
from nvflare_llm_components.flare.quorum import Quorum
from nvflare_llm_components.flare.results import contribution_of
from nvflare_llm_components.flare.waiting import close_room, open_room
from nvflare_llm_components.tensors.blocks import blocks_of
from nvflare_llm_components.tensors.lazy import Deferred
from nvflare_llm_components.tensors.text import printable

FINAL_FILE = "final_evaluation.json"


class QuorumFedAvg(FedAvg):
    """FedAvg that goes on with the sites that are there, and ends a job rather than average too few.

    A round is over when every sampled site has answered, or `grace_s` seconds after its `quorum`-th result
    was accepted. Only accepted results count: FLARE's own `min_responses` counts error replies, too, so that
    two failing sites would end a round with nothing to average. A site that is lost is not waited for beyond
    the grace period; one that comes back is given the round that stands then. The job ends, naming the sites
    and their reasons, when so many have failed that the quorum can't be reached any more; the last good model
    stays on disk.

    Let `dead_client_grace_period` in the server's configuration be longer than the cuts that the lines are
    known for: FLARE gives up a round when all sites that it waits for are silent for that long.

    Formula: McMahan et al., https://arxiv.org/abs/1602.05629, algorithm 1, over the results of the round.
    """

    aggregator: ModelAggregator | None
    enable_tensor_disk_offload: bool | None

    def __init__(
        self,
        *,
        num_clients: int,
        num_rounds: int,
        quorum: int | None = None,
        grace_s: float = 0.0,
        start_round: int = 0,
        persistor_id: str = "persistor",
        aggregator: ModelAggregator | None = None,
        stop_cond: str | None = None,
        patience: int | None = None,
        enable_tensor_disk_offload: bool | None = None,
        fedprox_mu: float | None = None,
        task_check_period: float = 0.5,
    ):
        """Store the settings.

        Args:
            num_clients: sites that each round is given to; where more are there, a random draw of them.
            num_rounds: rounds of this job.
            quorum: results without which there is no average; None: of all `num_clients`.
            grace_s: seconds that the other sites are given after that.
            start_round: number of the first round, of a job that continues another one.
            persistor_id: component id of the persistor.
            aggregator: what averages; None is `OrderedAverage`: the same bits in any order of arrival, and
                exact for one site.
            stop_cond: see FLARE's FedAvg.
            patience: see FLARE's FedAvg.
            enable_tensor_disk_offload: let results wait on disk, in the run directory, so that a further site
                costs no memory; None: where the aggregator is one of this package, and the disk has room.
            fedprox_mu: FedProx's coefficient; None or 0 for none.
            task_check_period: seconds between two looks at a round.

        Raises:
            ValueError: when the job is parsed, for a quorum or grace that can't be.
        """
        super().__init__(
            num_clients=num_clients,
            num_rounds=num_rounds,
            start_round=start_round,
            persistor_id=persistor_id,
            aggregator=aggregator,
            stop_cond=stop_cond,
            patience=patience,
            enable_tensor_disk_offload=enable_tensor_disk_offload,
            fedprox_mu=fedprox_mu,
            task_check_period=task_check_period,
            ignore_result_error=True,  # FLARE would count a site that failed as one that answered
        )
        self.quorum = quorum
        self.grace_s = grace_s
        self._least = num_clients if quorum is None else quorum
        if not 1 <= self._least <= num_clients:
            raise ValueError(f"quorum: expected 1 to num_clients={num_clients}, found {quorum!r}.")
        if not 0 <= grace_s < float("inf"):
            raise ValueError(f"grace_s: expected seconds from 0 on, found {grace_s!r}.")
        self._quorum = Quorum([], self._least, grace_s)
        self._has_ended = False

    def run(self) -> None:
        """Train; see FLARE's FedAvg."""
        self.aggregator = self.aggregator or OrderedAverage()
        self.aggregator.fl_ctx = self.fl_ctx
        if self.enable_tensor_disk_offload is None:
            self.enable_tensor_disk_offload = isinstance(self.aggregator, CollectingAggregator)
        try:
            super().run()
        finally:
            close_room(Path(self.get_run_dir()))

    def load_model(self) -> FLModel:
        """Load the first model, when FLARE has set up where results wait."""
        model: FLModel = super().load_model()
        if self.enable_tensor_disk_offload:
            fault = open_room(Path(self.get_run_dir()), self.engine, model.params, self.num_clients)
            if fault:
                self.warning(fault)
        return model

    def sample_clients(self, num_clients: int | None = None) -> list[str]:
        """Draw a round's sites; where not all train, the log says so."""
        sampled: list[str] = super().sample_clients(num_clients)
        num_there = len(self.engine.get_clients())
        if len(sampled) < num_there:
            self.warning(
                f"Round {self.current_round}: {len(sampled)} of {num_there} sites train, drawn at random. "
                "For all of them, set num_clients in the server's configuration."
            )
        return sampled

    def send_model(
        self,
        task_name: str = "train",
        data: FLModel | None = None,
        targets: list[str] | None = None,
        min_responses: int | None = None,
        timeout: int = 0,
        callback: Callable[[FLModel], None] | None = None,
    ) -> None:
        """Give a round's model to its sites; see FLARE's ModelController."""
        self._quorum = Quorum(sorted(targets or []), self._least, self.grace_s)
        if isinstance(self.aggregator, CollectingAggregator) and self._saves_lazy_values and data:
            self.aggregator.lazy_shapes = {name: value.shape for name, value in data.params.items()}
        super().send_model(task_name, data, targets, min_responses, timeout, callback)

    def get_num_standing_tasks(self) -> int:
        """Number of tasks that are not over. FedAvg asks this while it waits: here a round is ended."""
        num_standing: int = super().get_num_standing_tasks()
        if num_standing and self._quorum.is_over(self._received_count):
            # Until FLARE has taken the task away, a result may still be on its way into the sum.
            self.cancel_all_tasks(TaskCompletionStatus.OK)
        if not num_standing and self._received_count < self._least:
            self._end_job()
            return 1  # FedAvg leaves when FLARE has set the abort signal: too little must not be averaged
        return num_standing

    def update_model(self, model: FLModel, aggr_result: FLModel) -> FLModel:
        """Put a round's average, or the sum of model and change, in the model's place; see FLARE's FedAvg."""
        if aggr_result.params_type == ParamsType.DIFF:
            changes = aggr_result.params.items()
            sums = {name: _sum(model.params[name], change) for name, change in changes}
            aggr_result.params = {**model.params, **sums}
            aggr_result.params_type = ParamsType.FULL
        updated: FLModel = super().update_model(model, aggr_result)
        return updated

    @property
    def _saves_lazy_values(self) -> bool:
        """Whether each average is made as it is saved: not where `stop_cond` may leave one unsaved."""
        return getattr(self.persistor, "saves_lazy_values", False) and self.stop_condition is None

    def _aggregate_one_result(self, result: FLModel) -> bool:
        try:
            taken: bool = super()._aggregate_one_result(result)
        except Exception as error:
            self._fail(str((result.meta or {}).get("client_name")), printable(error))
            raise
        return taken

    def _fail(self, site: str, reason: str) -> None:
        """Note why a site's result does not count, and end the job where too few are left."""
        self._quorum.failures[site] = reason
        if self._quorum.is_out_of_reach:
            self._end_job()

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        if not is_unknown_task and result.get_return_code() != ReturnCode.OK:
            self._fail(client_name, error_of(result) or printable(result.get_return_code()))
        accepted: bool = super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task)
        return accepted

    def _get_aggregated_result(self) -> FLModel:
        if self._received_count < len(self._quorum.sites):
            self.warning(f"{self._found()} The round is averaged without the others.")
        aggregated: FLModel = super()._get_aggregated_result()
        return aggregated

    def _end_job(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self.panic(
                f"{self._found()} Expected at least {self._least} (quorum). The last good model stays on "
                "disk: `nvflare-llm resume` goes on from it."
            )

    def _found(self) -> str:
        return self._quorum.sentence(self.current_round, self._received_count)


def _sum(origin: torch.Tensor, change: torch.Tensor | Deferred) -> torch.Tensor | Deferred:
    if not isinstance(change, Deferred):
        return origin + change
    dtype = torch.promote_types(origin.dtype, change.dtype)
    return Deferred(lambda: _sums(origin, change), change.shape, dtype)


def _sums(origin: torch.Tensor, change: Deferred) -> Iterator[torch.Tensor]:
    for one, other in zip(blocks_of(origin), change.blocks(), strict=True):
        yield one + other


class FinalEvaluation(ModelController):
    """Lets the sites evaluate the model that a job ends with, so that it, too, can be the best one.

    A site evaluates each global model before it trains on; nobody trains on the last one. Put this after the
    workflow that trains. Costs one message to each site; the mean is taken with the weights that the sites'
    results had, as the model selector does. Leaves ``final_evaluation.json`` in the run directory.
    """

    def __init__(
        self,
        *,
        persistor_id: str = "persistor",
        key_metric: str = "eval_loss",
        negate_key_metric: bool = True,
        timeout_s: int = 36000,
        grace_s: int = 600,
        task_check_period: float = 0.5,
    ):
        """Store the settings.

        Args:
            persistor_id: component id of the `SafetensorsModelPersistor`.
            key_metric: what models are compared by, as the job's `IntimeModelSelector` has it.
            negate_key_metric: whether lower is better, as there.
            timeout_s: seconds that the sites have, all in all.
            grace_s: seconds that the others have when the first has answered; one that is late is left out.
            task_check_period: seconds between two looks at the answers.
        """
        super().__init__(
            persistor_id=persistor_id, ignore_result_error=True, task_check_period=task_check_period
        )
        self.persistor_id = persistor_id
        self.key_metric = key_metric
        self.negate_key_metric = negate_key_metric
        self.timeout_s = timeout_s
        self.grace_s = grace_s
        self._weights: dict[str, float] = {}
        self._last_round = 0

    @inside_only
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Remember each site's weight and the number of the last round, whatever workflow trains."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.ROUND_STARTED:
            self._last_round = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND) or 0)
        elif event_type == AppEventType.AFTER_CONTRIBUTION_ACCEPT and (found := contribution_of(fl_ctx)):
            site, dxo = found
            self._weights[site] = float(dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, 1.0))

    def run(self) -> None:
        """Send the last model to all sites, and tell of what they find."""
        learnable = self.persistor.get("last", self.fl_ctx)
        self._last_round = self._saved_round()
        self.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, learnable, private=True, sticky=True)
        # Numbered as the next round: sites that hold the last one's model are sent the difference to it.
        model = FLModel(
            params=learnable[ModelLearnableKey.WEIGHTS],
            params_type=ParamsType.FULL,
            current_round=self._last_round + 1,
        )
        results = self.broadcast_model(
            model,
            "validate",
            targets=self.sample_clients(),
            min_responses=1,
            wait_time_after_min_received=self.grace_s,
            timeout=self.timeout_s,
        )
        losses = {
            result.meta["client_name"]: float(result.metrics[self.key_metric])
            for result in results
            if isinstance((result.metrics or {}).get(self.key_metric), int | float)
        }
        if losses:
            self._tell(losses)
        else:
            self.warning("The last model was not evaluated: no site reported its loss.")

    def _saved_round(self) -> int:
        """The last model's round, as it was saved: a job that goes on after its last round begins none."""
        saved = self.persistor.get_model_inventory(self.fl_ctx).get("last")
        number = (saved.props or {}).get("round") if saved else None
        return self._last_round if number is None else int(number)

    def _tell(self, losses: dict[str, float]) -> None:
        weights = {site: self._weights.get(site, 1.0) for site in losses}
        mean = sum(weights[site] * loss for site, loss in losses.items()) / sum(weights.values())
        where = f"{len(losses)} site{'s' * (len(losses) > 1)}"
        self.info(f"Final model, of round {self._last_round}: {self.key_metric} {mean:.4f} at {where}")
        run_dir = run_dir_of(self.fl_ctx)
        if run_dir:
            record = {"round": self._last_round, self.key_metric: mean, "sites": losses}
            (run_dir / FINAL_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")
        mode = "min" if self.negate_key_metric else "max"
        info = {
            "key_metric": {"name": self.key_metric, "mode": mode},
            "best_metrics": {self.key_metric: mean},
        }
        self.fl_ctx.set_prop(AppConstants.METRICS_SELECTION_INFO, info, private=True, sticky=False)
        self.event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE)
