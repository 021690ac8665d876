"""The server's global model as a folder that Hugging Face opens: FLARE's persistor and model locator.

:mod:`.start` is what a run starts from.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.dxo import DXO
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
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

from nvflare_llm_components.checkpoint.global_models import BEST, FOLDER, LAST, GlobalModels
from nvflare_llm_components.checkpoint.initial_model import InitialModel
from nvflare_llm_components.checkpoint.key_metric import KeyMetric
from nvflare_llm_components.checkpoint.manifest import read_manifest
from nvflare_llm_components.checkpoint.mapped import share_on_deepcopy
from nvflare_llm_components.flare.arrival import register_tensors
from nvflare_llm_components.flare.gate import ResultGate
from nvflare_llm_components.flare.headers import is_server
from nvflare_llm_components.flare.memory import (
    give_back,
    keep_large_buffers_apart,
    pass_over_what_is_there,
)
from nvflare_llm_components.flare.peers import inside_only
from nvflare_llm_components.flare.results import evaluated_round, record_of, release_result, validation_of
from nvflare_llm_components.flare.site import accepted_write
from nvflare_llm_components.persistors.start import Start, resumed_folder
from nvflare_llm_components.policy.results import ExpectedTensors, ResultRules
from nvflare_llm_components.tensors.convert import tensor_of
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.lazy import LazyValue

SOURCE = "source"
ALIASES = {"FL_global_model.pt": LAST, "best_FL_global_model.pt": BEST}
MODEL_FORMAT = "safetensors"


class SafetensorsModelPersistor(ModelPersistor):
    """Starts a job from safetensors and saves its global models where `from_pretrained` opens them.

    The folders are `global_model/last`, `best` and `round_N` in the job's run directory. Each holds
    safetensors, config, generation config, tokenizer and `federation.json`; for adapters it is a PEFT folder.
    """

    saves_lazy_values = True
    """For controllers: `save_model` takes values that are made as they are written, and returns tensors."""

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
        results: dict[str, Any] | None = None,
        trainable: list[str] | None = None,
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
            results: what a site's result may be: "data_kind" ("WEIGHTS" or "WEIGHT_DIFF"; by default what the
                job's client configuration says), "max_weight" in the average (1e9 examples), "equal_weights"
                (false), "also_meta" (keys of its meta that a controller of the job needs). A result that is
                something else, or does not have the model's tensors, all finite, costs its site the round.
            trainable: the executors' patterns of names that train; saved folders hold the other tensors too.
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
        self.results = results
        self.trainable = trainable
        self._initial: InitialModel | None = None
        self._models: GlobalModels | None = None
        self._evaluated: dict[str, dict[str, dict[str, float]]] = {}
        self._gate = ResultGate()
        register_tensors()

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Return the model that the job starts from, mapped from its files; an empty one if a site has it.

        Raises:
            CheckpointError: if it can't be read, or doesn't fit its configuration, or the settings are wrong.
            PolicyError: if `results` is not what it may be, or the model is larger than this machine takes.
        """
        ResultRules.of(self.results)
        keep_large_buffers_apart()
        if self.initial_weights not in ("server", "sites"):
            raise CheckpointError(
                f'initial_weights: expected "server" or "sites", found {self.initial_weights!r}.'
            )
        start = self._initial_model(fl_ctx)
        self._global_models(fl_ctx)
        pass_over_what_is_there()
        if self.initial_weights == "sites":
            self.log_info(fl_ctx, f"Global model: {len(start.weights)} tensors, to come from a site")
            return make_model_learnable({}, {})
        self.log_info(fl_ctx, f"Global model: {len(start.weights)} tensors from {start.name}")
        return make_model_learnable(dict(start.weights), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Save the global model as `last`, and give the controller the saved file's tensors for its own.

        Raises:
            CheckpointError: if the model is empty, partial, mis-shaped or not finite, or the disk is full,
                with what was refused in its round; `last` stays as it was.
            PolicyError: if less of the disk is free than must be.
        """
        weights = model[ModelLearnableKey.WEIGHTS]
        record = record_of(fl_ctx, fl_ctx.get_prop(AppConstants.CURRENT_ROUND), self.model_name_or_path)
        models = self._global_models(fl_ctx)
        accepted_write(fl_ctx, models.root.parent)
        try:
            saved = models.save_last({name: _to_save(value) for name, value in weights.items()}, record)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {self._gate.sentence(record['round'])}".rstrip()) from error
        finally:
            self._gate.forget()
        for alias in weights.keys() - saved.keys():
            del weights[alias]
        # A controller that keeps NumPy arrays goes on with them.
        weights.update(
            {
                name: kept
                for name, kept in saved.items()
                if isinstance(weights.get(name, kept), torch.Tensor | LazyValue)
            }
        )
        self.log_info(fl_ctx, f"Global model of round {record['round']} saved in {models.root}")
        give_back()

    @inside_only
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keep the best model; look at each site's result before it counts, and let go of it after."""
        if event_type == EventType.START_RUN and self.initial_weights == "sites" and is_server(fl_ctx):
            # Results come before FLARE asks for the model. Built only at the first of them, it would hold up
            # the other sites beyond the seconds that they give the server for an answer.
            with suppress(Exception):  # told in load_model, where it ends the job
                self._initial_model(fl_ctx)
        elif event_type == AppEventType.GLOBAL_BEST_MODEL_AVAILABLE:
            self._save_best(fl_ctx)
        elif event_type == AppEventType.VALIDATION_RESULT_RECEIVED:
            if found := validation_of(fl_ctx):
                model, site, metrics = found
                self._evaluated.setdefault(model, {})[site] = metrics
        elif event_type == EventType.END_RUN and self._evaluated:
            verdict = self._global_models(fl_ctx).judge_last(self._evaluated)
            self.log_info(fl_ctx, verdict or f"Evaluated: {self._evaluated}")
        elif event_type == EventType.BEFORE_TASK_DATA_FILTER and is_server(fl_ctx):
            self._gate.note_task(fl_ctx)
        elif event_type == EventType.AFTER_TASK_RESULT_FILTER and is_server(fl_ctx):
            self._inspect_result(fl_ctx)
        elif event_type == AppEventType.BEFORE_CONTRIBUTION_ACCEPT and not is_server(fl_ctx):
            if reason := self._gate.inspect_contribution(lambda: self._expected(fl_ctx), fl_ctx):
                self.log_error(fl_ctx, reason)
        elif event_type == EventType.AFTER_PROCESS_SUBMISSION:
            release_result(fl_ctx)

    def get_model_inventory(self, fl_ctx: FLContext) -> dict[str, ModelDescriptor]:
        """Return what can be had by `get_model`: source, then last and best where they were saved.

        A saved model's properties have its `round`.
        """
        saved = self._global_models(fl_ctx).folders()
        props = {name: {"round": read_manifest(folder).get("round")} for name, folder in saved.items()}
        found = {SOURCE: self._initial_model(fl_ctx).folder, **saved}
        return {
            name: ModelDescriptor(
                name=name, location=str(folder), model_format=MODEL_FORMAT, props=props.get(name, {})
            )
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
        weights = (
            self._initial_model(fl_ctx).weights if name == SOURCE else self._global_models(fl_ctx).load(name)
        )
        return make_model_learnable(dict(weights), {})

    def _initial_model(self, fl_ctx: FLContext) -> InitialModel:
        if self._initial is None:
            self._initial = Start.of(self).accepted(fl_ctx)()
            share_on_deepcopy(self._initial.weights)
        return self._initial

    def _global_models(self, fl_ctx: FLContext) -> GlobalModels:
        if self._models is None:
            run_dir = fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())
            self._models = GlobalModels(
                Path(run_dir) / FOLDER,
                self._initial_model(fl_ctx),
                keep=self.keep,
                save_dtype=self.save_dtype,
                max_shard_size=self.max_shard_size,
            )
            if self.resume_from is not None:
                self._models.take_over(resumed_folder(fl_ctx, str(self.resume_from)).parent)
        return self._models

    def _save_best(self, fl_ctx: FLContext) -> None:
        """Save the model that the sites have just evaluated: the result of the round before this one."""
        evaluated = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
        info = fl_ctx.get_prop(AppConstants.METRICS_SELECTION_INFO) or {}
        record = record_of(fl_ctx, evaluated_round(fl_ctx) - 1, self.model_name_or_path)
        record["metrics"] = dict(info.get("best_metrics", {}))
        key = KeyMetric.of(info) if record["metrics"] else None
        tensors = {name: tensor_of(value) for name, value in evaluated.items()}
        if self._global_models(fl_ctx).save_best(tensors, record, key):
            self.log_info(fl_ctx, f"Best global model: round {record['round']}, {record['metrics']}")

    def _inspect_result(self, fl_ctx: FLContext) -> None:
        """Let the gate check a result, and log why it refused it, or why its site failed."""
        if reason := self._gate.inspect(lambda: self._expected(fl_ctx), fl_ctx):
            self.log_error(fl_ctx, reason)

    def _expected(self, fl_ctx: FLContext) -> tuple[ResultRules, ExpectedTensors]:
        start = self._initial_model(fl_ctx)
        specs = {name: (tuple(value.shape), value.dtype) for name, value in start.weights.items()}
        return ResultRules.of(self.results), ExpectedTensors(specs, start.aliases)


def _to_save(value: Any) -> torch.Tensor | LazyValue:
    """A value as a tensor; one that is lazy is made when it is written."""
    return value if isinstance(value, LazyValue) else tensor_of(value)


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
