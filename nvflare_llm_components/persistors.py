"""The server's global model as a folder that Hugging Face opens: FLARE's persistor and model locator."""

from pathlib import Path
from typing import Any

import torch
from nvflare.apis.dxo import DXO, from_shareable
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
from nvflare.app_common.model_desc import ModelDescriptor
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from nvflare_llm_components.checkpoint.folder import map_weights
from nvflare_llm_components.checkpoint.memory import give_back, keep_large_buffers_apart
from nvflare_llm_components.checkpoint.shared import share_on_deepcopy
from nvflare_llm_components.checkpoint.snapshot import save_snapshot
from nvflare_llm_components.checkpoint.soundness import refuse_unsound
from nvflare_llm_components.checkpoint.source import locate
from nvflare_llm_components.checkpoint.start import Start, start_from

FOLDER = "global_model"
SOURCE, LAST, BEST = "source", "last", "best"
ALIASES = {"FL_global_model.pt": LAST, "best_FL_global_model.pt": BEST}
MODEL_FORMAT = "safetensors"
ERROR_HEADER = "nvflare_llm_error"  # set by our executor on the reply of a failed task
WIRE_MARKER = "nvflare_llm_precision"  # the meta key of a message in lower precision


class SafetensorsModelPersistor(ModelPersistor):
    """Starts a job from safetensors and saves its global models where `from_pretrained` opens them.

    The folders are `global_model/last` and `global_model/best` in the job's run directory. Each holds
    safetensors, config, generation config, tokenizer and `federation.json`; for adapters it is a PEFT folder.
    """

    def __init__(
        self,
        *,
        model_name_or_path: str | None = None,
        peft_config: dict[str, Any] | None = None,
        save_dtype: str | None = None,
        max_shard_size: int | str = "5GB",
        seed: int = 0,
    ):
        """Store the settings; nothing is read before the job asks for its model.

        Args:
            model_name_or_path: folder or hub name of a model, or folder of an adapter to go on with.
            peft_config: settings of a fresh adapter for `peft.get_peft_config`, with its `peft_type`.
            save_dtype: "float32", "float16" or "bfloat16" on disk; None keeps the aggregate's.
            max_shard_size: a larger model is saved in shards of at most this size: bytes, or such as "5GB".
            seed: of a fresh adapter's values.
        """
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.peft_config = peft_config
        self.save_dtype = save_dtype
        self.max_shard_size = max_shard_size
        self.seed = seed
        self._start: Start | None = None
        fobs.register(TensorDecomposer)

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Return the model that the job starts from, mapped from its files.

        Raises:
            CheckpointError: if it can't be read, or doesn't fit its configuration.
        """
        keep_large_buffers_apart()
        start = self._started()
        self.log_info(fl_ctx, f"Global model: {len(start.weights)} tensors from {self.model_name_or_path}")
        return make_model_learnable(dict(start.weights), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Save the global model as `last`, and give the controller the saved file's tensors for its own.

        Raises:
            CheckpointError: if the model is empty, partial, mis-shaped or not finite; `last` stays as it was.
        """
        weights = model[ModelLearnableKey.WEIGHTS]
        tensors = {name: _tensor(value) for name, value in weights.items()}
        current_round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        shapes = {name: tuple(value.shape) for name, value in self._started().weights.items()}
        refuse_unsound(tensors, shapes, f"The global model after round {current_round}")
        self._save(LAST, tensors, self._record(fl_ctx, current_round), fl_ctx)
        self._hand_back(weights, self._folder(fl_ctx, LAST))
        del tensors
        give_back()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Save the best model when a selector names it; look at each result, and let it go once used."""
        if event_type == AppEventType.GLOBAL_BEST_MODEL_AVAILABLE:
            self._save_best(fl_ctx)
        elif event_type == EventType.AFTER_TASK_RESULT_FILTER:
            self._inspect_result(fl_ctx)
        elif event_type == EventType.AFTER_PROCESS_SUBMISSION:
            _release_result(fl_ctx)

    def _inspect_result(self, fl_ctx: FLContext) -> None:
        """Log why a site failed, and end the job where a result is still encoded: its average is noise."""
        result = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
        if not isinstance(result, Shareable):
            return
        if reason := result.get_header(ERROR_HEADER):
            self.log_error(fl_ctx, str(reason))
        elif _is_encoded(result):
            site = fl_ctx.get_peer_context().get_identity_name()
            task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
            self.system_panic(
                f"Result of task '{task}' from site '{site}': expected full precision, found it still "
                "encoded. PrecisionDequantizeFilter is missing from the server's task_result_filters for "
                "this task.",
                fl_ctx,
            )

    def get_model_inventory(self, fl_ctx: FLContext) -> dict[str, ModelDescriptor]:
        """Return what can be had by `get_model`: source, then last and best where they were saved."""
        found = {SOURCE: locate(self.model_name_or_path)}
        found.update({name: self._folder(fl_ctx, name) for name in (LAST, BEST)})
        return {
            name: ModelDescriptor(name=name, location=str(folder), model_format=MODEL_FORMAT, props={})
            for name, folder in found.items()
            if folder.is_dir()
        }

    def get_model(self, model_file: str, fl_ctx: FLContext) -> ModelLearnable:
        """Return a model of the inventory, mapped from its files.

        Args:
            model_file: "source", "last" or "best", or one of FLARE's own names for the latter two.
            fl_ctx: FLARE's context.

        Raises:
            ValueError: if there is no such model.
        """
        name = ALIASES.get(model_file, model_file)
        inventory = self.get_model_inventory(fl_ctx)
        if name not in inventory:
            raise ValueError(f"Model '{model_file}': expected one of {list(inventory)}, found no such model.")
        if name == SOURCE:
            return make_model_learnable(dict(self._started().weights), {})
        weights = map_weights(Path(inventory[name].location))
        share_on_deepcopy(weights)
        return make_model_learnable(weights, {})

    def _started(self) -> Start:
        if self._start is None:
            self._start = start_from(self.model_name_or_path, self.peft_config, self.seed)
            share_on_deepcopy(self._start.weights)
        return self._start

    def _folder(self, fl_ctx: FLContext, name: str) -> Path:
        run_dir = fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())
        return Path(run_dir) / FOLDER / name

    def _save(
        self, name: str, tensors: dict[str, torch.Tensor], record: dict[str, Any], fl_ctx: FLContext
    ) -> None:
        folder = self._folder(fl_ctx, name)
        dtype = getattr(torch, self.save_dtype) if self.save_dtype else None
        save_snapshot(folder, tensors, self._started().companions, record, self.max_shard_size, dtype)
        self.log_info(fl_ctx, f"Global model of round {record['round']} saved as {folder}")

    def _save_best(self, fl_ctx: FLContext) -> None:
        """Save the model that the sites have just evaluated: the result of the round before this one."""
        evaluated = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
        tensors = {name: _tensor(value) for name, value in evaluated.items()}
        saved_round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND) - 1
        self._save(BEST, tensors, self._record(fl_ctx, saved_round, _best_metrics(fl_ctx)), fl_ctx)

    def _hand_back(self, weights: dict[str, Any], folder: Path) -> None:
        """Put the saved file's tensors in the place of equal ones in memory, which are freed."""
        saved = map_weights(folder)
        share_on_deepcopy(saved)
        for name, value in weights.items():
            if isinstance(value, torch.Tensor) and value.dtype == saved[name].dtype:
                weights[name] = saved[name]

    def _record(
        self, fl_ctx: FLContext, saved_round: int, metrics: dict[str, float] | None = None
    ) -> dict[str, Any]:
        stats = fl_ctx.get_prop(AppConstants.AGGREGATION_STATS) or {}
        sites = sorted(stats.get("contributors", []))
        return {
            "round": saved_round,
            "job_id": fl_ctx.get_job_id(),
            "metrics": metrics or {},
            "parents": {"source": self.model_name_or_path, "sites": sites},
        }


def _is_encoded(result: Shareable) -> bool:
    try:
        return from_shareable(result).get_meta_prop(WIRE_MARKER) is not None
    except ValueError:  # no model in it
        return False


def _tensor(value: Any) -> torch.Tensor:
    """Return what a state dict holds as a tensor: it may be NumPy's, or still encoded."""
    tensor: torch.Tensor = torch.as_tensor(value.materialize() if hasattr(value, "materialize") else value)
    return tensor


def _release_result(fl_ctx: FLContext) -> None:
    """Let go of a site's result that was aggregated: controllers keep the context of the last one."""
    for context, key in (
        (fl_ctx, FLContextKey.TASK_RESULT),
        (fl_ctx.get_peer_context(), FLContextKey.SHAREABLE),
    ):
        detail = context.get_prop_detail(key) if context else None
        if detail:
            context.set_prop(key, None, private=detail["private"], sticky=detail["sticky"])
    give_back()


def _best_metrics(fl_ctx: FLContext) -> dict[str, float]:
    info = fl_ctx.get_prop(AppConstants.METRICS_SELECTION_INFO) or {}
    return dict(info.get("best_metrics", {}))


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
