"""Components that act on a job's events, beside its executor or its workflow."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import MetaKey
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLMetaKey, WorkspaceConstants
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.apis.utils.format_check import check_job_id
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.fuel.data_event.data_bus import DataBus
from nvflare.metrics.metrics_keys import MetricKeys, MetricTypes
from nvflare.metrics.metrics_publisher import publish_app_metrics
from nvflare.widgets.info_collector import GroupInfoCollector, InfoCollector

from nvflare_llm_components.flare.headers import is_server
from nvflare_llm_components.flare.messages import run_dir_of
from nvflare_llm_components.flare.peers import inside_only, peer_name_of
from nvflare_llm_components.flare.results import contribution_of
from nvflare_llm_components.flare.rounds import ROUND_RECORD, Round
from nvflare_llm_components.flare.site import accepted_run
from nvflare_llm_components.flare.tasks import finite, is_simulator
from nvflare_llm_components.flare.told import told
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.quantization.ledger import wire_bytes_of_round
from nvflare_llm_components.tensors.atomic import replace_folder
from nvflare_llm_components.tensors.links import link_tree

ROUNDS_FILE = "rounds.jsonl"
METRICS_PREFIX = "nvflare_llm"
STATE_FOLDERS = ("trainer_state", "filter_state")
_PHASES = {
    AppEventType.BEFORE_AGGREGATION: "sites",
    AppEventType.AFTER_AGGREGATION: "averaging",
    AppEventType.AFTER_LEARNABLE_PERSIST: "saving",
}
_OWNER = (JobMetaKey.SUBMITTER_NAME, JobMetaKey.SUBMITTER_ORG, JobMetaKey.STUDY)


class EarlierRunState(FLComponent):
    """Brings what a site kept of an earlier run, trainer and filter state, into the run that continues it."""

    def __init__(self, *, run_dir: str | None = None, job_ids: Sequence[str] = ()):
        """Store the settings.

        Args:
            run_dir: run directory of the earlier run at this site, where it is not one of this workspace's.
            job_ids: ids of the earlier jobs, the latest first; their run directories are looked for in this
                site's workspace. Only a job of the same submitter and study is continued: a state holds what
                was learned from a site's rows.
        """
        super().__init__()
        self.run_dir = run_dir
        self.job_ids = job_ids

    @inside_only
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Link when the run starts: executor and filters look into the run directory at their first task."""
        if event_type != EventType.START_RUN:
            return
        workspace = fl_ctx.get_engine().get_workspace()
        run_dir = Path(workspace.get_run_dir(fl_ctx.get_job_id()))
        earlier = self._named(fl_ctx)
        for job_id in self.job_ids:
            check_job_id(job_id)  # a name, no path
            folder = Path(workspace.get_run_dir(job_id))
            if folder.is_dir() and _owner(folder) != _owner(run_dir):
                self.log_error(fl_ctx, f"Job {job_id} is another submitter's or study's: not continued here")
            else:
                earlier.append(folder)
        for name in STATE_FOLDERS:
            self._take_over(name, earlier, run_dir / name, fl_ctx)

    def _named(self, fl_ctx: FLContext) -> list[Path]:
        """The run directory that the job gives by path, if this site lets it."""
        if not self.run_dir:
            return []
        try:
            return [accepted_run(fl_ctx, "EarlierRunState.run_dir", self.run_dir)]
        except PolicyError as error:
            # To end this site here would leave the server waiting for it.
            self.log_error(fl_ctx, f"{told(fl_ctx, error)} This site starts afresh.")
            return []

    def _take_over(self, name: str, earlier: list[Path], target: Path, fl_ctx: FLContext) -> None:
        if target.exists():
            return  # this process was started again within its run
        source = next((folder / name for folder in earlier if (folder / name).is_dir()), None)
        if source is None:
            places = ", ".join(map(str, earlier)) or "no earlier run"
            self.log_info(fl_ctx, f"{name}: none left at {places}; this site starts afresh")
            return
        # Whole or not at all: a copy that a kill cut short would pass for a state.
        replace_folder(target, lambda folder: link_tree(source, folder))
        self.log_info(fl_ctx, f"{name} continues from {source}")


def _owner(run_dir: Path) -> list[Any]:
    """Who submitted a job, as FLARE's server told this site when it deployed it."""
    file = run_dir / WorkspaceConstants.JOB_META_FILE
    meta = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [meta.get(key.value) for key in _OWNER]


class QuorumMember(FLComponent):
    """Lets the others go on when this site's job process dies: killed, out of memory, a crash of CUDA.

    FLARE's server ends a job for all as soon as one site's parent process reports such an end, whatever the
    quorum. The parent believes what the job process has left as its return code before how it ended, so
    one that says nothing of the job is left from the start on, and taken back when the run ends in order.
    The server then hears that the site is gone, and `QuorumFedAvg` decides. A configuration that can't be
    built still ends the job: that comes before the start.
    """

    @inside_only
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Leave the code when the run starts, and take it back at its end."""
        if event_type not in (EventType.START_RUN, EventType.END_RUN):
            return
        run_dir = run_dir_of(fl_ctx)
        if run_dir is None or is_simulator(fl_ctx) or is_server(fl_ctx):
            return
        file = run_dir / FLMetaKey.PROCESS_RC_FILE
        if event_type == EventType.START_RUN:
            file.write_text(str(int(JobReturnCode.UNKNOWN)), encoding="ascii")
        else:
            file.unlink(missing_ok=True)


class RoundLog(FLComponent):
    """Tells once a round, on the server: sites done and missing, eval loss, bytes, seconds, time left.

    One line in the log; the same as a line of `rounds.jsonl` in the run directory, with each site's metrics;
    as `round` and `loss` for FLARE's ``nvflare job monitor``; and as gauges ``nvflare_llm_*`` for what hears
    FLARE's application metrics in this process, such as its `StatsDReporter`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._round: Round | None = None
        self._loss: float | None = None

    @inside_only
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow a round from event to event. What is raised here ends no job."""
        if event_type == AppEventType.ROUND_STARTED:
            self._begin(fl_ctx)
        elif self._round is None:
            return
        elif event_type == EventType.AFTER_TASK_DATA_FILTER:
            if site := peer_name_of(fl_ctx):
                self._round.give(site)
        elif event_type == AppEventType.AFTER_CONTRIBUTION_ACCEPT:
            self._note(fl_ctx)
        elif event_type in _PHASES:
            self._round.end_phase(_PHASES[event_type])
        elif event_type == AppEventType.BEFORE_LEARNABLE_PERSIST:
            fl_ctx.set_prop(ROUND_RECORD, self._round.record(), private=True, sticky=False)
        elif event_type == InfoCollector.EVENT_TYPE_GET_STATS:
            collector = fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR)
            if isinstance(collector, GroupInfoCollector):
                collector.set_info("federation", self._stats(self._round))
        if event_type in (AppEventType.AFTER_LEARNABLE_PERSIST, EventType.END_RUN):
            self._tell(fl_ctx)

    def _begin(self, fl_ctx: FLContext) -> None:
        self._tell(fl_ctx)
        number = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND) or 0)
        planned = fl_ctx.get_prop(AppConstants.NUM_ROUNDS)
        # FLARE's FedAvg tells how many rounds this job has in its first round only.
        last = self._round.num_rounds if self._round else number + int(planned) if planned else None
        asked = sorted(client.name for client in fl_ctx.get_engine().get_clients())
        self._round = Round(fl_ctx.get_job_id(), number, last, asked)

    def _note(self, fl_ctx: FLContext) -> None:
        contribution = contribution_of(fl_ctx)
        if self._round is None or contribution is None:
            return
        site, dxo = contribution
        told = dict(dxo.get_meta_prop(MetaKey.INITIAL_METRICS) or {})
        told["weight"] = dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, 1.0)
        self._round.accept(site, finite(told))

    def _tell(self, fl_ctx: FLContext) -> None:
        current = self._round
        if current is None or current.seconds or not current.results:
            return
        current.seconds = time.monotonic() - current.started
        run_dir = run_dir_of(fl_ctx)
        if run_dir:
            current.bytes_out, current.bytes_in = wire_bytes_of_round(run_dir, current.number)
            with (run_dir / ROUNDS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(current.record()) + "\n")
        metrics = {MetricKeys.type: MetricTypes.GAUGE, **current.gauges()}
        publish_app_metrics(metrics, METRICS_PREFIX, {"job_id": current.job_id}, DataBus())
        self.log_info(fl_ctx, current.sentence(self._loss))
        self._loss = current.mean("eval_loss")

    def _stats(self, current: Round) -> dict[str, float | int | str]:
        loss = current.mean("eval_loss") if current.results else self._loss
        stats: dict[str, float | int | str] = {"round": current.number, "sites": len(current.results)}
        return stats if loss is None else stats | {"loss": round(loss, 6)}
