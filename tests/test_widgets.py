import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ProcessType, ReservedKey, ReservedTopic
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.fuel.data_event.data_bus import DataBus
from nvflare.private.fed.client.client_executor import REPORTABLE_JOB_FAILURES
from nvflare.private.fed.utils.fed_utils import get_return_code

from nvflare_llm_components.flare.rounds import ROUND_RECORD
from nvflare_llm_components.policy.site import POLICY_FILE
from nvflare_llm_components.widgets import EarlierRunState, QuorumMember, RoundLog

OWNER = {"submitter_name": "ada@lab", "submitter_org": "lab", "study": "default"}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's workspace: job `old` ended early, `older` before it, `new` is to continue them."""
    for job in ("older", "old", "new"):
        run_dir(tmp_path, job, OWNER)
    keep(tmp_path / "old", "trainer_state")
    return tmp_path


def run_dir(site: Path, job: str, owner: dict[str, str]) -> None:
    (site / job).mkdir()
    (site / job / "meta.json").write_text(json.dumps(owner))


def keep(folder: Path, name: str) -> None:
    (folder / name / "step-3").mkdir(parents=True)
    (folder / name / "step-3/file").write_text(folder.name)


def start(component: EarlierRunState, site: Path) -> None:
    workspace = SimpleNamespace(
        get_run_dir=lambda job_id: str(site / job_id),
        get_app_dir=lambda job_id: str(site / job_id / "app"),
        get_root_dir=lambda: str(site),
        get_site_config_dir=lambda: str(site / "local"),
    )
    context = FLContext()
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True, sticky=True)
    engine = SimpleNamespace(get_workspace=lambda: workspace, fire_event=lambda *_: None)
    context.set_prop("__engine__", engine, private=True, sticky=True)
    context.set_prop(FLContextKey.CURRENT_RUN, "new", private=True, sticky=True)
    component.handle_event(EventType.START_RUN, context)


def taken_from(site: Path, name: str = "trainer_state") -> str:
    return (site / "new" / name / "step-3/file").read_text()


def test_a_site_takes_up_what_it_kept_and_says_what_it_lost(site: Path, caplog):
    with caplog.at_level("INFO"):
        start(EarlierRunState(job_ids=["old", "older"]), site)
    assert taken_from(site) == "old"
    assert "filter_state: none left at" in caplog.text
    assert "starts afresh" in caplog.text


def test_what_the_last_job_never_took_up_is_found_with_the_one_before(site: Path):
    keep(site / "older", "trainer_state")
    keep(site / "older", "filter_state")
    start(EarlierRunState(job_ids=["old", "older"]), site)
    assert taken_from(site) == "old"
    assert taken_from(site, "filter_state") == "older"


def test_a_run_directory_by_its_path(site: Path):
    start(EarlierRunState(run_dir=str(site / "old")), site)
    assert taken_from(site) == "old"


def test_a_run_directory_elsewhere_is_taken_from_where_the_site_says(site: Path, caplog):
    keep(site / "other/elsewhere", "trainer_state")
    start(EarlierRunState(run_dir=str(site / "other/elsewhere")), site)
    assert not (site / "new/trainer_state").exists()
    assert "expected a run directory of this site's own workspace" in caplog.text
    (site / "local").mkdir()
    (site / "local" / POLICY_FILE).write_text(f'[places]\nruns = ["{site / "other"}"]')
    start(EarlierRunState(run_dir=str(site / "other/elsewhere")), site)
    assert taken_from(site) == "elsewhere"


def test_a_state_that_the_job_brought_in_its_app_is_not_taken(site: Path, caplog):
    keep(site / "new/app/old", "trainer_state")
    start(EarlierRunState(run_dir=str(site / "new/app/old")), site)
    assert not (site / "new/trainer_state").exists()
    assert "expected a run directory of this site's own workspace" in caplog.text


def test_another_submitters_run_is_not_taken_by_its_path(site: Path, caplog):
    (site / "old/meta.json").write_text(json.dumps({**OWNER, "submitter_name": "eve@lab"}))
    start(EarlierRunState(run_dir=str(site / "old")), site)
    assert not (site / "new/trainer_state").exists()
    assert "of the same submitter" in caplog.text


@pytest.mark.parametrize("owner", [{**OWNER, "submitter_name": "eve@lab"}, {**OWNER, "study": "other"}, {}])
def test_another_submitters_or_studys_state_is_not_handed_over(site: Path, owner, caplog):
    (site / "old/meta.json").write_text(json.dumps(owner))
    start(EarlierRunState(job_ids=["old"]), site)
    assert not (site / "new/trainer_state").exists()
    assert "another submitter's" in caplog.text


def test_a_job_that_flare_says_nothing_of_is_nobodys(site: Path):
    (site / "old/meta.json").unlink()
    start(EarlierRunState(job_ids=["old"]), site)
    assert not (site / "new/trainer_state").exists()


@pytest.mark.parametrize("job_id", ["../elsewhere", "/etc", "", ".", "a/b"])
def test_a_job_id_is_no_path(site: Path, job_id: str):
    with pytest.raises(ValueError, match="job_id"):
        start(EarlierRunState(job_ids=[job_id]), site)
    assert not (site / "new/trainer_state").exists()


def test_a_copy_that_was_cut_short_is_no_state(site: Path, monkeypatch):
    """The process is killed while it copies; the next one takes the whole state."""

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", die)
        with pytest.raises(KeyboardInterrupt):
            start(EarlierRunState(job_ids=["old"]), site)
    assert not (site / "new/trainer_state").exists()
    start(EarlierRunState(job_ids=["old"]), site)
    assert taken_from(site) == "old"


def test_a_process_that_is_started_again_keeps_the_newer_state(site: Path):
    keep(site / "new", "trainer_state")
    start(EarlierRunState(job_ids=["old"]), site)
    assert taken_from(site) == "new"


class Server:
    """What `RoundLog` asks of an engine; `client` is the peer of the next event."""

    def __init__(self, run_dir: Path, *clients: str) -> None:
        self.context = FLContext()
        self._workspace = SimpleNamespace(get_run_dir=lambda job_id: str(run_dir))
        self._clients = [SimpleNamespace(name=name) for name in clients]
        for key, value in {"__engine__": self, FLContextKey.CURRENT_RUN: "job-1"}.items():
            self.context.set_prop(key, value, private=True, sticky=True)
        self.context.set_prop(FLContextKey.WORKSPACE_OBJECT, self._workspace, private=True, sticky=True)

    def get_clients(self) -> list[SimpleNamespace]:
        return self._clients

    def get_workspace(self) -> SimpleNamespace:
        return self._workspace

    def fire_event(self, *_: object) -> None:
        pass

    def tell(self, component: RoundLog, event_type: str, client: str | None = None, **props: object) -> None:
        if client:
            peer = FLContext()
            peer.set_prop(ReservedKey.IDENTITY_NAME, client, private=False, sticky=False)
            self.context.set_peer_context(peer)
        for key, value in props.items():
            self.context.set_prop(key, value, private=True, sticky=False)
        component.handle_event(event_type, self.context)


def result(loss: float) -> Shareable:
    meta = {"initial_metrics": {"eval_loss": loss}, "NUM_STEPS_CURRENT_ROUND": 4}
    return DXO(DataKind.WEIGHTS, {"w": 1}, meta).to_shareable()


def test_a_round_is_told_once_with_sites_phases_and_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server, log = Server(tmp_path, "a", "b"), RoundLog()
    heard: list[dict[str, object]] = []
    hear = lambda topic, metrics, bus: heard.extend(metrics)  # noqa: E731
    monkeypatch.setattr(DataBus(), "subscribers", {})
    DataBus().subscribe([ReservedTopic.APP_METRICS], hear)
    server.tell(log, AppEventType.ROUND_STARTED, current_round=0, num_rounds=2)
    server.tell(log, EventType.AFTER_TASK_DATA_FILTER, client="a")
    for client, accepted in (("a", True), ("b", False)):
        told = {AppConstants.TRAINING_RESULT: result(2.0), AppConstants.AGGREGATION_ACCEPTED: accepted}
        server.tell(log, AppEventType.AFTER_CONTRIBUTION_ACCEPT, client=client, **told)
    for event in ("BEFORE_AGGREGATION", "AFTER_AGGREGATION", "BEFORE_LEARNABLE_PERSIST"):
        server.tell(log, getattr(AppEventType, event))
    published = server.context.get_prop(ROUND_RECORD)
    server.tell(log, AppEventType.AFTER_LEARNABLE_PERSIST)
    server.tell(log, EventType.END_RUN)
    (line,) = (tmp_path / "rounds.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["job_id"], record["round"], record["missing"]) == ("job-1", 0, ["b"])
    assert record["sites"]["a"].keys() == {"eval_loss", "weight", "seconds"}
    assert list(record["seconds_by_phase"]) == ["sites", "averaging", "saving"]
    assert published["sites"] == record["sites"], "the saved model's record has it, too"
    gauges = {metric["metric_name"]: metric["value"] for metric in heard}
    assert len(gauges) == len(heard), "each is told once"
    assert {(metric["type"], metric["tags"]["job_id"]) for metric in heard} == {("gauge", "job-1")}
    assert gauges["nvflare_llm_eval_loss"] == 2.0
    assert (gauges["nvflare_llm_sites"], gauges["nvflare_llm_missing"]) == (1, 1)
    assert "nvflare_llm_train_loss" not in gauges


def member_context(site: Path, process: str, job: str = "new") -> FLContext:
    workspace = SimpleNamespace(get_run_dir=lambda job_id: str(site / job_id))
    context = FLContext()
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True, sticky=True)
    context.set_prop(
        "__engine__", SimpleNamespace(get_workspace=lambda: workspace), private=True, sticky=True
    )
    context.set_prop(FLContextKey.CURRENT_RUN, job, private=True, sticky=True)
    context.set_prop(ReservedKey.PROCESS_TYPE, process, private=True, sticky=True)
    return context


def parents_verdict(site: Path, code_of_process: int) -> int:
    """What FLARE's parent process reads when the job's process has ended with a code."""
    handle = SimpleNamespace(poll=lambda: code_of_process)
    verdict: int = get_return_code(handle, "new", str(site), logging.getLogger())
    return verdict


def test_a_killed_job_process_says_nothing_that_ends_the_job_of_the_others(site: Path):
    context = member_context(site, ProcessType.CLIENT_JOB)
    QuorumMember().handle_event(EventType.START_RUN, context)
    assert parents_verdict(site, JobReturnCode.EXECUTION_ERROR) not in REPORTABLE_JOB_FAILURES


def test_a_job_process_that_ends_in_order_tells_its_own_code(site: Path):
    context = member_context(site, ProcessType.CLIENT_JOB)
    QuorumMember().handle_event(EventType.START_RUN, context)
    QuorumMember().handle_event(EventType.END_RUN, context)
    assert parents_verdict(site, JobReturnCode.SUCCESS) == JobReturnCode.SUCCESS


@pytest.mark.parametrize(
    ("process", "job"),
    [(ProcessType.SERVER_JOB, "new"), (ProcessType.CLIENT_JOB, "simulate_job")],
    ids=["server", "simulator"],
)
def test_no_code_is_left_where_no_site_is_lost(process: str, job: str, site: Path):
    (site / "simulate_job").mkdir()
    QuorumMember().handle_event(EventType.START_RUN, member_context(site, process, job))
    assert not list(site.rglob("_process_rc.txt"))
