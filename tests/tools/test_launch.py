import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvflare.apis.job_def import RunStatus
from rich.console import Console

from nvflare_llm_components.checkpoint.model_folder import save_model_folder
from nvflare_llm_components.tools.deployment import JobState, UnreachableError, takes_token
from nvflare_llm_components.tools.launch import CHAIN_FILE, LOST, Launch
from nvflare_llm_components.tools.shell import CommandError

JOBS = Path(__file__).parents[2] / "job_configs"
NAME = "3135896c-7b94-4c15-9429-2d828193047{}"
DONE, FAILED = "FINISHED:COMPLETED", "FINISHED:EXECUTION_EXCEPTION"


class Federation:
    """Ends each job as the script says: ``lost`` is a restarted server, ``away`` one that does not answer.

    Attributes:
        endings: one a job, each with the round that it saved; the last one stands for all others.
    """

    def __init__(self, *endings: tuple[str, int | None]) -> None:
        self.endings = endings
        self.submitted: list[Path] = []
        self.tokens: list[str] = []
        self.num_unanswered = 0
        self.members = {"site-1", "site-2"}
        self.away: list[set[str]] = []  # look by look
        self.there_when_submitted: list[set[str]] = []
        self.of_others: set[str] = set()

    def jobs(self, name: str) -> set[str]:
        self.answer()
        return {self.name(number + 1) for number in range(len(self.submitted))} | self.of_others

    def submit(self, job: Path, token: str | None) -> str:
        self.answer()
        if token is None:
            assert not takes_token(job)
            token = f"none {len(self.tokens)}"
        else:
            assert takes_token(job), "FLARE's server fails over it"
        if token not in self.tokens:
            self.submitted.append(job)
            self.tokens.append(token)
            self.there_when_submitted.append(self.members - (self.away[0] if self.away else set()))
        return self.name(self.tokens.index(token) + 1)

    def sites(self, job_id: str) -> set[str]:
        self.answer()
        return self.members

    def connected(self) -> set[str]:
        self.answer()
        return self.members - (self.away.pop(0) if self.away else set())

    def name(self, number: int) -> str:
        return NAME.format(number)

    def ending(self, job_id: str) -> tuple[str, int | None]:
        number = int(job_id[-1]) - 1
        return self.endings[min(number, len(self.endings) - 1)]

    def state(self, job_id: str) -> JobState:
        self.answer()
        ending, _ = self.ending(job_id)
        if ending != "lost":
            return JobState(ending, False, 1.0)
        self.looks = getattr(self, "looks", 0) + 1
        is_running = self.looks % 3 != 0
        return JobState("RUNNING", is_running, 1.0 if is_running else 2.0)

    def progress(self, job_id: str) -> dict[str, object]:
        return {"round": 0, "loss": 1.5}

    def saved_round(self, job_id: str) -> int | None:
        return self.ending(job_id)[1]

    def download(self, job_id: str, folder: Path) -> Path:
        self.answer()
        saved, job = self.ending(job_id)[1], self.submitted[int(job_id[-1]) - 1]
        run = folder / job_id
        shutil.copytree(job, run / "job/it")
        shutil.copytree(job / "app", run / "workspace/app_server")
        for file in (run / "meta.json", run / "workspace/meta.json"):
            shutil.copyfile(job / "meta.json", file)
        if saved is not None:
            weights, record = {"a": torch.ones(2)}, {"round": saved, "metrics": {}}
            save_model_folder(run / "workspace/global_model/last", weights, {}, record)
        return run

    def answer(self) -> None:
        if self.num_unanswered:
            self.num_unanswered -= 1
            raise UnreachableError("connection refused")


Start = Callable[[Federation], Launch]


@pytest.fixture
def told() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def start(tmp_path: Path, told: io.StringIO) -> Start:
    console = Console(file=told, width=300)
    return lambda federation: Launch(federation, tmp_path / "out", console, every_s=0.0)


def chain(tmp_path: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((tmp_path / "out" / CHAIN_FILE).read_text())["runs"]
    return runs


def server(job: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((job / "app/config/config_fed_server.json").read_text())
    return config


def args_of(config: dict[str, Any], id: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in [*config["components"], *config["workflows"]] if c["id"] == id)
    return dict(found["args"])


def test_a_job_that_completes_is_downloaded(start: Start, tmp_path: Path):
    federation = Federation((DONE, 2))
    assert start(federation).to_the_end(JOBS / "sft") == tmp_path / "out" / NAME.format(1)
    assert [run["ending"] for run in chain(tmp_path)] == [DONE]


def test_a_job_whose_server_was_restarted_goes_on_in_place(start: Start, tmp_path: Path):
    federation = Federation(("lost", 0), ("lost", 1), (DONE, 2))
    start(federation).to_the_end(JOBS / "sft")
    assert [(run["job_id"], run["ending"]) for run in chain(tmp_path)] == [
        (NAME.format(1), LOST),
        (NAME.format(2), LOST),
        (NAME.format(3), DONE),
    ]
    config = server(federation.submitted[2])
    fedavg = args_of(config, "fedavg")
    assert (fedavg["start_round"], fedavg["num_rounds"]) == (2, 1)
    assert args_of(config, "persistor")["resume_from"] == "{WORKSPACE}/" + NAME.format(2)
    client = json.loads((federation.submitted[2] / "app/config/config_fed_client.json").read_text())
    for side in (config, client):
        (state,) = [c["args"] for c in side["components"] if c["id"] == "earlier_run_state"]
        assert state == {"job_ids": [NAME.format(2), NAME.format(1)]}
    assert json.loads((federation.submitted[2] / "meta.json").read_text())["name"] == "sft_resumed"


def test_sites_that_are_late_after_a_restart_are_waited_for(start: Start, told: io.StringIO, tmp_path: Path):
    federation = Federation(("lost", 0), (DONE, 2))
    launch = start(federation)
    federation.away = [{"site-1", "site-2"}, {"site-2"}, {"site-2"}]
    launch.to_the_end(JOBS / "sft")
    assert federation.there_when_submitted[1:] == [{"site-1", "site-2"}]
    assert told.getvalue().count("connected again: site-1, site-2") == 1


def test_a_site_that_does_not_come_back_is_waited_for_so_long_only(start: Start, told: io.StringIO):
    federation = Federation(("lost", 0), (DONE, 2))
    launch = start(federation)
    launch.sites_s = 0.02
    federation.away = [{"site-2"}] * 1_000_000
    launch.to_the_end(JOBS / "sft")
    assert federation.there_when_submitted[1:] == [{"site-1"}]
    assert "Not back after 0.02 s: site-2. The job is continued without." in told.getvalue()


def test_a_job_that_had_saved_nothing_begins_again(start: Start, tmp_path: Path):
    federation = Federation(("lost", None), (DONE, 2))
    start(federation).to_the_end(JOBS / "sft")
    assert server(federation.submitted[1])["workflows"] == server(JOBS / "sft")["workflows"]


@pytest.mark.parametrize("ending", ["lost", FAILED])
def test_what_comes_after_the_last_round_is_done_without_a_further_one(
    ending: str, start: Start, tmp_path: Path
):
    federation = Federation((ending, 2), (DONE, 2))
    start(federation).to_the_end(JOBS / "sft")
    fedavg = args_of(server(federation.submitted[1]), "fedavg")
    assert (fedavg["start_round"], fedavg["num_rounds"]) == (3, 0)


def test_a_job_that_failed_is_continued_as_long_as_it_gets_further(start: Start, tmp_path: Path):
    federation = Federation((FAILED, 0), (FAILED, 1), (FAILED, 1))
    with pytest.raises(CommandError, match=r"0473.*no round further"):
        start(federation).to_the_end(JOBS / "sft")
    assert list(federation.submitted[1].glob("*/earlier_run/global_model/last"))


@pytest.mark.parametrize("ending", [RunStatus.FINISHED_ABORTED.value, RunStatus.FINISHED_CANT_SCHEDULE.value])
def test_a_job_that_was_ended_on_purpose_stays_ended(ending: str, start: Start):
    federation = Federation((ending, 1))
    with pytest.raises(CommandError, match="not continued"):
        start(federation).to_the_end(JOBS / "sft")
    assert len(federation.submitted) == 1


def test_a_server_that_is_away_is_waited_for_and_told_of_once(start: Start, told: io.StringIO):
    federation = Federation((DONE, 2))
    federation.num_unanswered = 4
    start(federation).to_the_end(JOBS / "sft")
    assert told.getvalue().count("does not answer") == 1


def test_a_second_call_goes_on_with_the_chain_and_submits_nothing_twice(start: Start, tmp_path: Path):
    federation = Federation(("lost", 0), (DONE, 2))
    submit = federation.submit

    def taken_and_then_cut(job: Path, token: str) -> str:
        if submit(job, token) == NAME.format(2) and federation.submit is not submit:
            federation.submit = submit  # type: ignore[method-assign]
            raise KeyboardInterrupt
        return submit(job, token)

    federation.submit = taken_and_then_cut  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        start(federation).to_the_end(JOBS / "sft")
    assert start(federation).to_the_end(JOBS / "sft").name == NAME.format(2)
    assert len(federation.submitted) == 2
    with pytest.raises(ValueError, match="expected the chain of"):
        start(federation).to_the_end(JOBS / "sft_int8")


def test_a_server_can_not_name_a_job_out_of_the_folder(start: Start, tmp_path: Path):
    federation = Federation((DONE, 2))
    federation.name = lambda number: "../../elsewhere"  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="elsewhere"):
        start(federation).to_the_end(JOBS / "sft")
    assert not (tmp_path.parent / "elsewhere").exists()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A job with a model beside it that FLARE makes no hash of."""
    job = tmp_path / "large"
    shutil.copytree(JOBS / "sft", job)
    (job / "app" / "model.safetensors").write_bytes(bytes(10 * 2**20 + 1))
    return job


def test_a_job_with_large_files_is_submitted_once_without_a_token(start: Start, large: Path, tmp_path: Path):
    federation, submit = Federation((DONE, 2)), Federation.submit

    def taken_and_then_cut(job: Path, token: str | None) -> str:
        submit(federation, job, token)
        raise UnreachableError("cut")

    federation.of_others = {NAME.format(8)}  # of the same name, and there before
    federation.submit = taken_and_then_cut  # type: ignore[method-assign]
    start(federation).to_the_end(large)
    assert federation.submitted == [large]
    assert [run["job_id"] for run in chain(tmp_path)] == [NAME.format(1)]


def test_a_job_that_came_at_the_same_time_is_not_taken_for_ones_own(start: Start, large: Path):
    federation = Federation((DONE, 2))

    def lost(job: Path, token: str | None) -> str:
        federation.of_others = {NAME.format(8), NAME.format(9)}
        raise UnreachableError("cut")

    federation.submit = lost  # type: ignore[method-assign]
    with pytest.raises(CommandError, match=NAME.format(8)):
        start(federation).to_the_end(large)
