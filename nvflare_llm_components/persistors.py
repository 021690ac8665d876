"""The server's global model as a folder that Hugging Face opens: FLARE's persistor and model locator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.dxo import DXO
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import (
    ModelLearnable,
    ModelLearnableKey,
    make_model_learnable,
    model_learnable_to_dxo,
)
from nvflare.app_common.abstract.model_locator import ModelLocator
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.ccwf.common import Constant as SwarmConstant
from nvflare.app_common.model_desc import ModelDescriptor
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from nvflare_llm_components.checkpoint.contributions import NonFiniteResults
from nvflare_llm_components.checkpoint.errors import CheckpointError, NonFiniteError
from nvflare_llm_components.checkpoint.global_models import BEST, LAST, GlobalModels, earlier_model
from nvflare_llm_components.checkpoint.shared import share_on_deepcopy
from nvflare_llm_components.checkpoint.source import locate
from nvflare_llm_components.checkpoint.start import Start, start_from
from nvflare_llm_components.conventions import ERROR_HEADER, WIRE_MARKER, is_server
from nvflare_llm_components.memory import give_back, keep_large_buffers_apart
from nvflare_llm_components.persistor_context import (
    KEY_METRIC,
    loss_of,
    release_result,
    tensor_of,
    weights_of,
)

FOLDER = "global_model"
SOURCE = "source"
ALIASES = {"FL_global_model.pt": LAST, "best_FL_global_model.pt": BEST}
MODEL_FORMAT = "safetensors"
SERVER_PREFIX = "SRV_"  # what FLARE's evaluations put before the name of a server's model


class SafetensorsModelPersistor(ModelPersistor):
    """Starts a job from safetensors and saves its global models where `from_pretrained` opens them.

    The folders are `global_model/last`, `best` and `round_N` in the job's run directory. Each holds
    safetensors, config, generation config, tokenizer and `federation.json`; for adapters it is a PEFT folder.
    """

    def __init__(
        self,
        *,
        model_name_or_path: str | None = None,
        peft_config: dict[str, Any] | None = None,
        save_dtype: str | None = None,
        max_shard_size: int | str = "5GB",
        keep: Sequence[str] = (LAST, BEST),
        seed: int = 0,
        resume_from: str | None = None,
        initial_weights: str = "server",
    ):
        """Store the settings; nothing is read before the job asks for its model.

        Args:
            model_name_or_path: folder or hub name of a model, or folder of an adapter to go on with.
            peft_config: settings of a fresh adapter for `peft.get_peft_config`, with its `peft_type`.
            save_dtype: "float32", "float16" or "bfloat16" on disk; None keeps the aggregate's. Where it is
                narrower, the model that the job goes on with is kept beside, as `global_model/master`.
            max_shard_size: a larger model is saved in shards of at most this size: bytes, or such as "5GB".
            keep: "last" (always), "best", and "every N" for each N-th round's model.
            seed: of a fresh adapter's values.
            resume_from: the server's run directory of an earlier job; its last model is started from, and its
                best stays the best until there is a better one.
            initial_weights: "server", or "sites" where FLARE's `InitializeGlobalWeights` fetches them from a
                site; the server's folder then gives names, shapes and what is saved beside the weights.
        """
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.peft_config = peft_config
        self.save_dtype = save_dtype
        self.max_shard_size = max_shard_size
        self.keep = keep
        self.seed = seed
        self.resume_from = resume_from
        self.initial_weights = initial_weights
        self._start: Start | None = None
        self._models: GlobalModels | None = None
        self._losses: dict[str, dict[str, float]] = {}
        self._non_finite = NonFiniteResults()
        fobs.register(TensorDecomposer)

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Return the model that the job starts from, mapped from its files; an empty one if a site has it.

        Raises:
            CheckpointError: if it can't be read, or doesn't fit its configuration, or the settings are wrong.
        """
        keep_large_buffers_apart()
        if self.initial_weights not in ("server", "sites"):
            raise CheckpointError(
                f'initial_weights: expected "server" or "sites", found {self.initial_weights!r}.'
            )
        start = self._started()
        self._global_models(fl_ctx)
        if self.initial_weights == "sites":
            self.log_info(fl_ctx, f"Global model: {len(start.weights)} tensors, to come from a site")
            return make_model_learnable({}, {})
        self.log_info(fl_ctx, f"Global model: {len(start.weights)} tensors from {self.model_name_or_path}")
        return make_model_learnable(dict(start.weights), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Save the global model as `last`, and give the controller the saved file's tensors for its own.

        Raises:
            CheckpointError: if the model is empty, partial, mis-shaped or not finite (then naming the sites
                that sent such values), or the disk is full; `last` stays as it was.
        """
        weights = model[ModelLearnableKey.WEIGHTS]
        record = self._record(fl_ctx, fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
        models = self._global_models(fl_ctx)
        try:
            saved = models.save_last({name: tensor_of(value) for name, value in weights.items()}, record)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} {self._non_finite.sentence(record['round'])}".rstrip()) from None
        finally:
            self._non_finite.forget()
        # A controller that keeps NumPy arrays goes on with them.
        weights.update({name: saved[name] for name in weights if isinstance(weights[name], torch.Tensor)})
        self.log_info(fl_ctx, f"Global model of round {record['round']} saved in {models.root}")
        give_back()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keep the best model; look at each site's result before it counts, and let go of it after."""
        if event_type == AppEventType.GLOBAL_BEST_MODEL_AVAILABLE:
            self._save_best(fl_ctx)
        elif event_type == AppEventType.VALIDATION_RESULT_RECEIVED:
            self._note_validation(fl_ctx)
        elif event_type == EventType.END_RUN and self._losses:
            verdict = self._global_models(fl_ctx).judge_last(KEY_METRIC, self._losses)
            self.log_info(fl_ctx, verdict or f"Evaluated: {self._losses}")
        elif event_type == EventType.AFTER_TASK_RESULT_FILTER:
            self._inspect_result(fl_ctx)
        elif event_type == EventType.AFTER_PROCESS_SUBMISSION:
            release_result(fl_ctx)

    def get_model_inventory(self, fl_ctx: FLContext) -> dict[str, ModelDescriptor]:
        """Return what can be had by `get_model`: source, then last and best where they were saved."""
        found = {SOURCE: locate(self.model_name_or_path), **self._global_models(fl_ctx).folders()}
        return {
            name: ModelDescriptor(name=name, location=str(folder), model_format=MODEL_FORMAT, props={})
            for name, folder in found.items()
        }

    def get_model(self, model_file: str, fl_ctx: FLContext) -> ModelLearnable:
        """Return a model of the inventory, mapped from its files.

        Args:
            model_file: "source", "last" or "best", or one of FLARE's own names for the latter two.
            fl_ctx: FLARE's context.

        Raises:
            ValueError: if there is no such model.
            CheckpointError: if a file of it is missing or changed.
        """
        name = ALIASES.get(model_file, model_file)
        inventory = self.get_model_inventory(fl_ctx)
        if name not in inventory:
            raise ValueError(f"Model '{model_file}': expected one of {list(inventory)}, found no such model.")
        weights = self._started().weights if name == SOURCE else self._global_models(fl_ctx).load(name)
        return make_model_learnable(dict(weights), {})

    def _started(self) -> Start:
        if self._start is None:
            if self.resume_from is None:
                self._start = start_from(self.model_name_or_path, self.peft_config, self.seed)
            else:
                self._start = start_from(str(self._earlier_model()), self.peft_config, self.seed)
            share_on_deepcopy(self._start.weights)
        return self._start

    def _global_models(self, fl_ctx: FLContext) -> GlobalModels:
        if self._models is None:
            run_dir = fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())
            self._models = GlobalModels(
                Path(run_dir) / FOLDER,
                self._started(),
                keep=self.keep,
                save_dtype=self.save_dtype,
                max_shard_size=self.max_shard_size,
            )
            if self.resume_from is not None:
                self._models.take_over(self._earlier_model().parent)
        return self._models

    def _earlier_model(self) -> Path:
        model = earlier_model(Path(str(self.resume_from)) / FOLDER)
        if model is None:
            raise CheckpointError(
                f"resume_from: expected a saved model below {self.resume_from}/{FOLDER}, found none. Give "
                "the server's run directory of the earlier job, or leave resume_from out."
            )
        return model

    def _save_best(self, fl_ctx: FLContext) -> None:
        """Save the model that the sites have just evaluated: the result of the round before this one."""
        evaluated = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
        info = fl_ctx.get_prop(AppConstants.METRICS_SELECTION_INFO) or {}
        # Swarm shares the best model when all is done, and says in which round it was evaluated.
        evaluated_in = fl_ctx.get_prop(SwarmConstant.ROUND, fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
        record = self._record(fl_ctx, evaluated_in - 1)
        record["metrics"] = dict(info.get("best_metrics", {}))
        lower_is_better = info.get("key_metric", {}).get("mode") == "min"
        tensors = {name: tensor_of(value) for name, value in evaluated.items()}
        if self._global_models(fl_ctx).save_best(tensors, record, lower_is_better):
            self.log_info(fl_ctx, f"Best global model: round {record['round']}, {record['metrics']}")

    def _record(self, fl_ctx: FLContext, saved_round: int) -> dict[str, Any]:
        stats = fl_ctx.get_prop(AppConstants.AGGREGATION_STATS) or {}
        sites = sorted(stats.get("contributors", []))
        return {
            "round": saved_round,
            "job_id": fl_ctx.get_job_id(),
            "metrics": {},
            "parents": {"source": self.model_name_or_path, "sites": sites},
        }

    def _note_validation(self, fl_ctx: FLContext) -> None:
        """Remember a site's loss of one of our models, for the verdict when the run ends."""
        owner = str(fl_ctx.get_prop(AppConstants.MODEL_OWNER))
        loss = loss_of(fl_ctx.get_prop(AppConstants.VALIDATION_RESULT))
        if owner.startswith(SERVER_PREFIX) and loss is not None:
            site = str(fl_ctx.get_prop(AppConstants.DATA_CLIENT))
            self._losses.setdefault(owner.removeprefix(SERVER_PREFIX), {})[site] = loss

    def _inspect_result(self, fl_ctx: FLContext) -> None:
        """Log why a site failed, note what isn't finite, and end the job where a result is still encoded."""
        result = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
        if not isinstance(result, Shareable):
            return
        if reason := result.get_header(ERROR_HEADER):
            self.log_error(fl_ctx, str(reason))
        elif dxo := weights_of(result):
            site = fl_ctx.get_peer_context().get_identity_name()
            if dxo.get_meta_prop(WIRE_MARKER) is not None:
                self._end_for_encoded(site, fl_ctx)
            elif is_server(fl_ctx):
                self._non_finite.note(site, result.get_header(AppConstants.CURRENT_ROUND), dxo.data)

    def _end_for_encoded(self, site: str, fl_ctx: FLContext) -> None:
        """End the job: an average of encoded results is noise."""
        self.system_panic(
            f"Result of task '{fl_ctx.get_prop(FLContextKey.TASK_NAME)}' from site '{site}': expected full "
            "precision, found it still encoded. PrecisionDequantizeFilter is missing from the server's "
            "task_result_filters for this task.",
            fl_ctx,
        )


class SafetensorsModelLocator(ModelLocator):
    """Names the persistor's models for FLARE's cross-site evaluation."""

    def __init__(self, *, persistor_id: str = AppConstants.DEFAULT_PERSISTOR_ID):
        """Store the settings.

        Args:
            persistor_id: component id of the `SafetensorsModelPersistor`.
        """
        super().__init__()
        self.persistor_id = persistor_id

    def get_model_names(self, fl_ctx: FLContext) -> list[str]:
        """Return the names of the persistor's inventory: source, last, best."""
        return list(self._persistor(fl_ctx).get_model_inventory(fl_ctx))

    def locate_model(self, model_name: str, fl_ctx: FLContext) -> DXO:
        """Return a model's weights, mapped from its files.

        Raises:
            ValueError: if there is no such model.
        """
        return model_learnable_to_dxo(self._persistor(fl_ctx).get(model_name, fl_ctx))

    def _persistor(self, fl_ctx: FLContext) -> SafetensorsModelPersistor:
        persistor = fl_ctx.get_engine().get_component(self.persistor_id)
        if not isinstance(persistor, SafetensorsModelPersistor):
            raise TypeError(
                f"SafetensorsModelLocator: expected component '{self.persistor_id}' to be a "
                f"SafetensorsModelPersistor, found {type(persistor).__name__}. Give its id as persistor_id."
            )
        return persistor
