"""The executor: FLARE's tasks on one side, a training session on the other. No mathematics here."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from nvflare_llm_components.conventions import ERROR_HEADER
from nvflare_llm_components.executor_context import (
    BadRequestError,
    finite,
    folders_of,
    global_model_of,
    is_simulator,
    rounds_left,
)
from nvflare_llm_components.memory import give_back
from nvflare_llm_components.training import weights
from nvflare_llm_components.training.session import RoundReport, SFTSession
from nvflare_llm_components.training.settings import TrainingSettings, given
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
        self._session: SFTSession | None = None
        self._num_rounds_left = 0
        self._engine: Any = None
        # Swarm and cross-site evaluation call from threads of their own.
        self._lock = threading.Lock()
        fobs.register(TensorDecomposer)

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
            reply = self._submit(shareable, fl_ctx)
        else:
            reason = (
                f"Task '{task_name}': expected train, validate, submit_model or get_weights. "
                "Correct the tasks of the executor in the job."
            )
            self.log_error(fl_ctx, reason)
            return make_reply(ReturnCode.TASK_UNSUPPORTED, headers={ERROR_HEADER: reason})
        reply.set_header(AppConstants.CURRENT_ROUND, shareable.get_header(AppConstants.CURRENT_ROUND))
        return reply

    def _train(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        started = time.monotonic()
        received, proximal_mu = global_model_of(shareable)
        session = self._prepared(fl_ctx)
        round_number = shareable.get_header(AppConstants.CURRENT_ROUND) or 0
        self._num_rounds_left = rounds_left(shareable)
        if received:
            session.load(received)
        kept = session.kept_round(round_number)
        if kept:
            self.log_info(
                fl_ctx, f"Round {round_number}: trained before this process was started, sent again"
            )
            return self._result(session.snapshot(), received, *kept)
        if self.params_type == "FULL":
            # FLARE holds the task while execute() runs. Its dict may be shared: dropped, not cleared.
            received = {}
            shareable.pop("DXO", None)
        elif not received:
            received = session.snapshot()

        def aborted() -> bool:
            return bool(abort_signal.triggered)

        session.begin_round(round_number, shareable.get_header(AppConstants.NUM_ROUNDS), aborted)
        metrics = session.evaluate(aborted) if session.has_eval_data else {}
        report = session.train_round(proximal_mu)
        sent = session.snapshot()
        session.keep_best(sent)
        session.keep(report, metrics, sent)
        session.record(report, time.monotonic() - started)
        self._log_round(report, metrics, fl_ctx)
        return self._result(sent, received, report, metrics)

    def _validate(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        received, _ = global_model_of(shareable)
        session = self._prepared(fl_ctx)
        if not session.has_eval_data:
            raise BadRequestError(
                "Task 'validate': expected eval_data in the executor's arguments, found none. Add it to "
                "the job."
            )
        own = session.snapshot()
        try:
            session.load(received)
            metrics = session.evaluate(lambda: bool(abort_signal.triggered))
        finally:
            session.load(own)
        return DXO(DataKind.METRICS, data=finite(metrics)).to_shareable()

    def _submit(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        session, data = self._prepared(fl_ctx), None
        if shareable.get_header(AppConstants.SUBMIT_MODEL_NAME) == ModelName.BEST_MODEL:
            data = session.best()
            if data is None:
                self.log_info(fl_ctx, "No best local model is kept (keep_best_local): the last is sent.")
        data = data or session.snapshot()
        return DXO(DataKind.WEIGHTS, data=data, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: 1}).to_shareable()

    def _result(
        self,
        new: weights.StateDict,
        received: Mapping[str, Any],
        report: RoundReport,
        metrics: dict[str, float],
    ) -> Shareable:
        is_full = self.params_type == "FULL"
        dxo = DXO(
            DataKind.WEIGHTS if is_full else DataKind.WEIGHT_DIFF,
            data=new if is_full else weights.difference(new, received),
            meta={
                MetaKey.NUM_STEPS_CURRENT_ROUND: report.num_examples,
                MetaKey.INITIAL_METRICS: finite({**metrics, "train_loss": report.train_loss}),
            },
        )
        return dxo.to_shareable()

    def _prepared(self, fl_ctx: FLContext) -> SFTSession:
        if self._session is None:
            run_dir, app_dir = folders_of(fl_ctx)
            self._session = SFTSession(self._settings(app_dir), run_dir, self._stream)
        return self._session

    def _settle(self, fl_ctx: FLContext) -> None:
        """The simulator may end this process next. A site's own process writes while it is idle."""
        # Swarm sends other results while this executor trains in a thread: there is nothing to wait for.
        if fl_ctx.get_prop(FLContextKey.TASK_NAME) == AppConstants.TASK_TRAIN:
            with self._lock:
                if self._session:
                    self._session.settle()

    def _settings(self, app_dir: Path) -> TrainingSettings:
        model = given("model_name_or_path", self.model_name_or_path)
        local_model = app_dir / model
        return TrainingSettings(
            model_name_or_path=str(local_model) if local_model.is_dir() else model,
            train_data=app_dir / given("train_data", self.train_data),
            eval_data=None if self.eval_data is None else app_dir / given("eval_data", self.eval_data),
            sft_config=self.sft_config or {},
            peft_config=self.peft_config,
            model_kwargs=self.model_kwargs or {},
            local_epochs=self.local_epochs,
            local_steps=self.local_steps,
            params_type=self.params_type,
            optimizer_state=self.optimizer_state,
            checkpoint=self.checkpoint,
            keep_best_local=self.keep_best_local,
        )

    def _stream(self, tag: str, value: float, step: int) -> None:
        if self._engine is None:
            return
        dxo = create_analytic_dxo(tag=tag, value=value, data_type=AnalyticsDataType.SCALAR, global_step=step)
        with self._engine.new_context() as fl_ctx:
            send_analytic_dxo(self, dxo, fl_ctx)

    def _failed(self, code: str, task_name: str, error: Exception, fl_ctx: FLContext) -> Shareable:
        site, cause = fl_ctx.get_identity_name(), f"{type(error).__name__}: {error}"
        reason = f"Task '{task_name}' failed at site '{site}': {cause}"
        self.log_exception(fl_ctx, reason)
        return make_reply(code, headers={ERROR_HEADER: reason})

    def _log_round(self, report: RoundReport, metrics: dict[str, float], fl_ctx: FLContext) -> None:
        seen = f", global model's eval_loss {metrics['eval_loss']:.4f}" if metrics else ""
        self.log_info(
            fl_ctx,
            f"Round {report.round}: {report.num_steps} steps, {report.num_examples} examples, "
            f"{report.num_tokens} tokens, train_loss {report.train_loss:.4f}{seen}, "
            f"{report.train_seconds:.1f} s of training",
        )

    def _close(self, job_is_over: bool = False) -> None:
        session, self._session = self._session, None
        if session:
            session.close()
            if job_is_over:
                session.forget()
