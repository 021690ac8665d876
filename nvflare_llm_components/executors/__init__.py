"""The executor: FLARE's tasks on one side, a training session on the other. No mathematics here.

:mod:`.accepted` is what a job trains with at this site, :mod:`.replies` what is said of a round.
"""

import threading
import time
from typing import Any, Literal

from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.app_common.app_constant import AppConstants, ModelName

from nvflare_llm_components.executors.accepted import accepted_training, settings_of
from nvflare_llm_components.executors.replies import result_of, sentence_of
from nvflare_llm_components.flare.arrival import register_tensors
from nvflare_llm_components.flare.chain import first_result_filter
from nvflare_llm_components.flare.headers import ERROR_HEADER
from nvflare_llm_components.flare.memory import give_back
from nvflare_llm_components.flare.pace import Pace
from nvflare_llm_components.flare.peers import inside_only
from nvflare_llm_components.flare.site import audit
from nvflare_llm_components.flare.tasks import (
    BadRequestError,
    finite,
    folders_of,
    global_model_of,
    is_simulator,
    round_of,
)
from nvflare_llm_components.flare.told import told, traceback_of
from nvflare_llm_components.policy.job import AcceptedTraining
from nvflare_llm_components.policy.limits import check_free_disk
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.quantization.rounding import rounded
from nvflare_llm_components.training.rounds import RoundCount
from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.worker import TrainingStoppedError


class HFSFTExecutor(Executor):
    """Supervised fine-tuning of a Hugging Face causal language model, continuous over all rounds of a job.

    Model, tokenizer, data and TRL ``SFTTrainer`` are built at the first task and stay inside one ``train()``
    call; each round loads the global weights in place and goes on. Answers the tasks ``train``, ``validate``,
    ``submit_model`` and ``get_weights``. Evaluates the incoming global model before each round if
    ``eval_data`` is given.

    Args:
        model_name_or_path: Hugging Face folder on the site, or hub name.
        train_data: Rows for training: ``.jsonl``, ``.json`` or ``.parquet`` with columns input and output,
            prompt and completion, messages, or text. Absolute, or relative to the app's folder in the run
            directory.
        eval_data: Rows for evaluation, of the same kinds; None for no evaluation.
        sft_config: Passed to ``trl.SFTConfig``.
        peft_config: Passed to ``peft.get_peft_config`` (needs ``peft_type``); None trains all weights.
        model_kwargs: Passed to ``from_pretrained``; ``dtype`` is float32 by default.
        local_epochs: Passes over the rows a round, may be fractional; one if neither budget is given.
        local_steps: Optimizer steps a round, instead of epochs.
        params_type: Send whole weights (``FULL``) or the change since the received ones (``DIFF``).
        optimizer_state: ``keep`` the optimizer over rounds, or ``reset`` it at each.
        checkpoint: When to keep training state on disk for a lost process: ``auto``, ``always`` or ``never``.
        keep_best_local: Evaluate each round's own model too, and let ``submit_model`` send the best of them
            when the best is asked for; otherwise the last is sent.
        schedule: What the learning rate follows where a site misses rounds: the ``federation``'s rounds, so
            that every site ends where the schedule ends, or the rounds that the ``site`` trained itself.
        num_processes: Processes that train as one on the site's machine, one a GPU; ``auto`` is one for each
            visible GPU. A batch of each is ``per_device_train_batch_size``.
        sharding: What each of them holds: all of the model (``none``, DDP) or a part (``full``, FSDP2).
        offload: Where the parts lie while nothing is computed with them: on the GPU (``none``) or in the
            machine's memory (``cpu``), which is slower and leaves the GPU to a layer and its activations.
        trainable: Patterns of the names of tensors that train, as in ``fnmatch`` (such as
            ``model.layers.1?.*``); only they travel, the others stay as they are. None trains all.
    """

    def __init__(
        self,
        *,
        model_name_or_path: str,
        train_data: str,
        eval_data: str | None = None,
        sft_config: dict[str, Any] | None = None,
        peft_config: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        local_epochs: float | None = None,
        local_steps: int | None = None,
        params_type: str = "FULL",
        optimizer_state: str = "keep",
        checkpoint: str = "auto",
        keep_best_local: bool = False,
        trainable: list[str] | None = None,
        schedule: str = "federation",
        num_processes: int | Literal["auto"] = 1,
        sharding: str = "none",
        offload: str = "none",
    ):
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.train_data = train_data
        self.eval_data = eval_data
        self.sft_config = sft_config
        self.peft_config = peft_config
        self.model_kwargs = model_kwargs
        self.local_epochs = local_epochs
        self.local_steps = local_steps
        self.params_type = params_type
        self.optimizer_state = optimizer_state
        self.checkpoint = checkpoint
        self.keep_best_local = keep_best_local
        self.trainable = trainable
        self.schedule = schedule
        self.num_processes = num_processes
        self.sharding = sharding
        self.offload = offload
        self._session: SFTSession | None = None
        self._gate: AcceptedTraining | None = None
        self._num_rounds_left = 0
        self._rounds: RoundCount | None = None
        self._engine: Any = None
        self._pace = Pace()
        # Swarm and cross-site evaluation call from threads of their own.
        self._lock = threading.Lock()
        register_tensors()

    @inside_only
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """End the training with the job. FLARE swallows what a handler raises, so nothing is built here."""
        if event_type == EventType.START_RUN:
            self._engine = fl_ctx.get_engine()
        elif event_type == EventType.AFTER_SEND_TASK_RESULT and is_simulator(fl_ctx):
            self._settle(fl_ctx)
        elif event_type == EventType.END_RUN:
            # A job that may be resumed keeps what it needs for that on disk. Where it is the server that
            # failed, FLARE tells its sites of no abort: then rounds are left.
            was_aborted = fl_ctx.get_prop(FLContextKey.RUN_ABORT_REQUESTED)
            self._close(job_is_over=not was_aborted and not self._num_rounds_left)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Answer one task; a failure is answered with a return code and its reason in ``ERROR_HEADER``."""
        with self._lock:
            reply = self._guarded(task_name, shareable, fl_ctx, abort_signal)
            if reply.get_return_code() in (ReturnCode.TASK_ABORTED, ReturnCode.EXECUTION_EXCEPTION):
                # Out of the handler, so that the exception no longer holds the model's memory.
                self._close()
            give_back()
            return reply

    def _guarded(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        try:
            return self._answer(task_name, shareable, fl_ctx, abort_signal)
        except TrainingStoppedError:
            return make_reply(ReturnCode.TASK_ABORTED)
        except BadRequestError as error:
            return self._failed(ReturnCode.BAD_REQUEST_DATA, task_name, error, fl_ctx)
        except Exception as error:
            return self._failed(ReturnCode.EXECUTION_EXCEPTION, task_name, error, fl_ctx)

    def _answer(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        if task_name == AppConstants.TASK_TRAIN:
            reply = self._train(shareable, fl_ctx, abort_signal)
        elif task_name == AppConstants.TASK_VALIDATION:
            reply = self._validate(shareable, fl_ctx, abort_signal)
        elif task_name in (AppConstants.TASK_SUBMIT_MODEL, AppConstants.TASK_GET_WEIGHTS):
            reply = self._submit(task_name, shareable, fl_ctx)
        else:
            reason = (
                f"Task {task_name!r:.100}: expected train, validate, submit_model or get_weights. "
                "Correct the tasks of the executor in the job."
            )
            self.log_error(fl_ctx, reason)
            return make_reply(ReturnCode.TASK_UNSUPPORTED, headers={ERROR_HEADER: reason})
        reply.set_header(AppConstants.CURRENT_ROUND, shareable.get_header(AppConstants.CURRENT_ROUND))
        return reply

    def _train(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        started = time.monotonic()
        received, proximal_mu = global_model_of(shareable)
        present, sends_change = round_of(shareable), self.params_type == "DIFF"
        session, gate = self._prepared(fl_ctx)
        self._num_rounds_left = present.num_left
        if received:
            received = session.load(received)
        else:
            gate.check_submission("train", session.is_of_federation)
        is_ours = type(self) is HFSFTExecutor  # one made of it may look at its result first
        first = first_result_filter(AppConstants.TASK_TRAIN, fl_ctx) if is_ours else ""
        if kept := session.kept_round(present.number):
            told = f"Round {present.number}: trained before this process was started, sent again"
            self.log_info(fl_ctx, told)
            return result_of(
                gate, session.present(), received if sends_change else None, *kept, first_filter=first
            )
        check_free_disk(folders_of(fl_ctx)[0], gate.policy.limits)
        gate.check_round(present.num_rounds or 0, session.rounds.done, session.num_steps)
        origin = (received or session.snapshot()) if sends_change else None
        del received
        if not sends_change:
            # FLARE holds the task while execute() runs. Its dict may be shared: dropped, not cleared.
            shareable.pop("DXO", None)

        aborted = gate.limited(lambda: bool(abort_signal.triggered))
        session.begin_round(present.number, present.num_rounds, aborted, present.first)
        metrics = session.evaluate(aborted) if session.has_eval_data else {}
        report = session.train_round(proximal_mu)
        gate.check_update(report.num_examples)
        ended = session.present()
        session.keep_best(ended)
        session.keep(report, metrics, ended)
        session.record(report, time.monotonic() - started, present.num_rounds)
        self.log_info(fl_ctx, sentence_of(report, metrics))
        return result_of(gate, ended, origin, report, metrics, first_filter=first)

    def _validate(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        received, _ = global_model_of(shareable)
        session, gate = self._prepared(fl_ctx)
        if not session.has_eval_data:
            raise BadRequestError(
                "Task 'validate': expected eval_data in the executor's arguments, found none. Add it to "
                "the job."
            )
        own = session.snapshot()
        try:
            session.load(received)
            metrics = session.evaluate(gate.limited(lambda: bool(abort_signal.triggered)))
        finally:
            session.load(own)
        return DXO(DataKind.METRICS, data=gate.told_metrics(finite(metrics))).to_shareable()

    def _submit(self, task_name: str, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        session, gate = self._prepared(fl_ctx)
        asks_best = shareable.get_header(AppConstants.SUBMIT_MODEL_NAME) == ModelName.BEST_MODEL
        data = session.best() if asks_best else None
        gate.check_submission(task_name, data is not None or session.has_own_result)
        if asks_best and data is None:
            self.log_info(fl_ctx, "No best local model is kept (keep_best_local): the last is sent.")
        data = rounded(data or session.snapshot(), gate.policy.leaves.precision)
        return DXO(DataKind.WEIGHTS, data=data, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: 1}).to_shareable()

    def _prepared(self, fl_ctx: FLContext) -> tuple[SFTSession, AcceptedTraining]:
        if self._session is None or self._gate is None:
            self._gate = gate = accepted_training(vars(self), fl_ctx)
            self._session = SFTSession(settings_of(gate), folders_of(fl_ctx)[0], self._stream, self._rounds)
            self._tell_loss(self._session.rounds_lost, fl_ctx)
        return self._session, self._gate

    def _tell_loss(self, num_rounds: int, fl_ctx: FLContext) -> None:
        if num_rounds:
            self.log_warning(
                fl_ctx,
                f"A failed task ended the training, and its last {num_rounds} rounds left no state on disk "
                f"(checkpoint={self.checkpoint!r}): the optimizer and the order of the rows go on from the "
                "state before them, or start anew; the learning rate's schedule goes on where it was.",
            )

    def _settle(self, fl_ctx: FLContext) -> None:
        """The simulator may end this process next. A site's own process writes while it is idle."""
        # Swarm sends other results while this executor trains in a thread: there is nothing to wait for.
        if fl_ctx.get_prop(FLContextKey.TASK_NAME) == AppConstants.TASK_TRAIN:
            with self._lock:
                if self._session:
                    self._session.settle()

    def _stream(self, tag: str, value: float, step: int) -> None:
        point = self._gate.told_curve(tag, value) if self._gate else None
        if self._engine is None or point is None or not self._pace.takes(tag, step):
            return
        dxo = create_analytic_dxo(tag=tag, value=point, data_type=AnalyticsDataType.SCALAR, global_step=step)
        with self._engine.new_context() as fl_ctx:
            send_analytic_dxo(self, dxo, fl_ctx)

    def _failed(self, code: str, task_name: str, error: Exception, fl_ctx: FLContext) -> Shareable:
        site, cause = fl_ctx.get_identity_name(), told(fl_ctx, error)
        reason = f"Task '{task_name}' failed at site '{site}': {cause}"
        # FLARE's kits stream error_log.txt to the server; what a library says may quote data.
        self.log_error(fl_ctx, reason)
        self.logger.warning("Task '%s' failed:\n%s", task_name, traceback_of(error))
        if isinstance(error, PolicyError):
            audit(fl_ctx, error)
        reply = make_reply(code, headers={ERROR_HEADER: reason})
        # FLARE's model selector prints a traceback for a reply that is no DXO.
        return DXO(DataKind.METRICS, data={}).update_shareable(reply)

    def _close(self, job_is_over: bool = False) -> None:
        session, self._session = self._session, None
        if session:
            self._rounds = session.rounds
            session.close()
            if job_is_over:
                session.forget()
