import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nvflare_llm_components.checkpoint.model_folder import save_model_folder
from nvflare_llm_components.checkpoint.weight_files import map_weights
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tools.continued import MOST_JOBS, continue_job_ids, earlier_state_of
from nvflare_llm_components.tools.resume import resume_job

JOBS = Path(__file__).parents[2] / "job_configs"
ID = "3135896c-7b94-4c15-9429-2d8281930470"
META = {"name": "sft", "deploy_map": {"app": ["@ALL"]}, "min_clients": 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The server's run directory of a simulator that died in round 1 of 3."""
    workspace = tmp_path / "ws"
    for site in ("server", "dolly", "alpaca"):
        shutil.copytree(JOBS / "sft/app", workspace / site / f"simulate_job/app_{site}")
    keep(workspace / "dolly/simulate_job/trainer_state", "1")
    write(workspace / "server/simulate_job/meta.json", META | {"job_clients": [{"name": "dolly"}]})
    save(workspace / "server/simulate_job", "last", 0)
    return workspace / "server/simulate_job"


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """What ``nvflare job download`` writes of a job that was aborted in round 1 of 3."""
    folder = tmp_path / "download" / ID
    shutil.copytree(JOBS / "sft", folder / "job/tmpx")
    write(folder / "job/tmpx/meta.json", META | {"scope": "lab", "launcher_spec": {"site-1": {"docker": {}}}})
    (folder / "job/tmpx/app/.__nvfl_sig.json").touch()
    shutil.copytree(folder / "job/tmpx/app", folder / "workspace/app_server")
    record = META | {"job_id": ID, "study": "cancer", "submitter_name": "ada", "status": "FINISHED:ABORTED"}
    write(folder / "workspace/meta.json", record)
    told = ["server: OK", "site-2: OK", "site-1: OK"]
    write(folder / "meta.json", record | {"job_deploy_detail": told})
    save(folder / "workspace", "last", 0)
    return folder


def write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def keep(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "state").write_text(text)


def save(run_dir: Path, name: str, number: int, **metrics: float) -> None:
    record = {"round": number, "metrics": metrics}
    save_model_folder(run_dir / "global_model" / name, {"a": torch.full((2,), number + 1.0)}, {}, record)


def config(job: Path, side: str = "server", app: str = "app") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((job / app / f"config/config_fed_{side}.json").read_text())
    return content


def edit(run_dir: Path, change: Any, side: str = "server") -> None:
    file = run_dir / f"app_server/config/config_fed_{side}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def component(content: dict[str, Any], name: str) -> dict[str, Any]:
    args: dict[str, Any] = next(c["args"] for c in content["components"] if c["id"] == name)
    return args


def rounds(job: Path, app: str = "app") -> tuple[int, int]:
    workflows = [workflow["args"] for workflow in config(job, app=app)["workflows"]]
    args = next(args for args in workflows if "num_rounds" in args)
    return args["start_round"], args["num_rounds"]


def wipe_and_start(workspace: Path, job: Path) -> Path:
    """What the simulator does to its workspace; returns the server's new run directory."""
    shutil.rmtree(workspace)
    for site in ("server", "dolly", "alpaca"):
        shutil.copytree(job / "app", workspace / site / f"simulate_job/app_{site}")
        shutil.copy(job / "meta.json", workspace / site / "simulate_job")
    return workspace / "server/simulate_job"


def test_the_job_continues_with_the_next_round_the_saved_model_and_each_sites_state(run, tmp_path):
    save(run, "best", 0, eval_loss=1.5)
    said = resume_job(run, tmp_path / "job")
    earlier = f"{tmp_path}/job_earlier_run"
    assert rounds(tmp_path / "job") == (1, 2)
    persistor = component(config(tmp_path / "job"), "persistor")
    assert persistor == {"model_name_or_path": "{model}", "resume_from": f"{earlier}/server"}
    for side in ("server", "client"):
        state = component(config(tmp_path / "job", side), "earlier_run_state")
        assert state == {"run_dir": f"{earlier}/{{SITE_NAME}}"}
    meta = json.loads((tmp_path / "job/meta.json").read_text())
    assert meta == META | {"name": "sft_resumed"}
    assert "round 1, 2 to do" in said
    assert "Best so far: {'eval_loss': 1.5}" in said
    assert "dolly: goes on with trainer_state" in said
    assert "alpaca: optimizer, schedule and data order start afresh" in said


@pytest.mark.parametrize("of", ["ws", "ws/server", "ws/server/simulate_job"])
def test_the_same_workspace_may_be_wiped_for_the_new_run(run: Path, tmp_path: Path, of: str):
    save(run, "best", 0, eval_loss=1.5)
    resume_job(tmp_path / of, tmp_path / "job")
    shutil.rmtree(tmp_path / "ws")
    kept = Path(component(config(tmp_path / "job"), "persistor")["resume_from"])
    assert map_weights(kept / "global_model/last")["a"].tolist() == [1, 1]
    assert map_weights(kept / "global_model/best")["a"].tolist() == [1, 1]
    assert (kept.parent / "dolly/trainer_state/state").read_text() == "1"


def test_a_job_can_be_continued_twice(run: Path, tmp_path: Path):
    resume_job(run, tmp_path / "job")
    new = wipe_and_start(tmp_path / "ws", tmp_path / "job")
    save(new, "last", 1)
    resume_job(new, tmp_path / "again")
    assert rounds(tmp_path / "again") == (2, 1)
    assert [c["id"] for c in config(tmp_path / "again")["components"]].count("earlier_run_state") == 1
    assert json.loads((tmp_path / "again/meta.json").read_text())["name"] == "sft_resumed", (
        "not resumed_resumed"
    )


def test_a_resumed_run_that_saved_nothing_goes_on_from_where_it_began(run: Path, tmp_path: Path):
    """It died before its first round was saved, and before this site had started."""
    resume_job(run, tmp_path / "job")
    new = wipe_and_start(tmp_path / "ws", tmp_path / "job")
    said = resume_job(new, tmp_path / "again")
    assert rounds(tmp_path / "again") == (1, 2)
    kept = Path(component(config(tmp_path / "again"), "persistor")["resume_from"])
    assert map_weights(kept / "global_model/last")["a"].tolist() == [1, 1]
    assert "dolly: goes on with trainer_state" in said
    shutil.rmtree(tmp_path / "job_earlier_run")
    with pytest.raises(ValueError, match="no model is left in either"):
        resume_job(new, tmp_path / "third")


def test_the_master_is_gone_on_from_where_it_is_as_late(run: Path, tmp_path: Path):
    save(run, "master", 0)
    assert "global_model/master" in resume_job(run, tmp_path / "job")
    save(run, "last", 1)
    assert "global_model/last" in resume_job(run, tmp_path / "again")


def test_nothing_saved_begins_again(run: Path, tmp_path: Path):
    shutil.rmtree(run / "global_model")
    assert "No round was saved" in resume_job(run, tmp_path / "job")
    assert rounds(tmp_path / "job") == (0, 3)
    assert "resume_from" not in component(config(tmp_path / "job"), "persistor")


def test_a_finished_run_wants_to_know_how_many_rounds(run: Path, tmp_path: Path):
    save(run, "last", 2)
    with pytest.raises(ValueError, match="all 3 rounds are done"):
        resume_job(run, tmp_path / "job")
    resume_job(run, tmp_path / "job", num_rounds=5)
    assert rounds(tmp_path / "job") == (3, 2)


def refused(run: Path, out: Path, match: str, **options: Any) -> None:
    with pytest.raises((ValueError, CheckpointError), match=match):
        resume_job(run, out, **options)
    left = {entry.name for entry in out.parent.iterdir()}
    assert not left & {"job", "job_earlier_run", ".job.writing", ".job_earlier_run.writing"}


def test_what_is_refused_leaves_nothing_behind(run: Path, tmp_path: Path):
    for wrong in (tmp_path / "nowhere", tmp_path, run / "global_model"):
        refused(wrong, tmp_path / "job", "expected a run")
        refused(wrong, tmp_path / "job", "expected a run", job=JOBS / "sft")
    refused(run, tmp_path / "job", "no such file", job=tmp_path)
    refused(run, tmp_path / "ws/job", "FLARE removes with the run")
    model = run / "global_model/last/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    refused(run, tmp_path / "job", r"model\.safetensors")


def test_a_job_that_breaks_half_way_leaves_nothing_behind(run: Path, tmp_path: Path):
    edit(run, lambda content: content.update(workflows=[]), "server")
    refused(run, tmp_path / "job", "can't begin in the middle")
    shutil.copy(JOBS / "sft/app/config/config_fed_server.json", run / "app_server/config")
    (run / "app_server/config/config_fed_client.json").write_text("{")
    refused(run, tmp_path / "job", "delimiter|property name|double quotes")


def test_nothing_is_written_over(run: Path, tmp_path: Path):
    resume_job(run, tmp_path / "job")
    with pytest.raises(ValueError, match="Choose another --out"):
        resume_job(run, tmp_path / "job")
    shutil.rmtree(tmp_path / "job")  # another job may still need what lies beside
    with pytest.raises(ValueError, match=r"job_earlier_run.*Choose another --out"):
        resume_job(run, tmp_path / "job")


def test_sites_with_apps_of_their_own_keep_them(run: Path, tmp_path: Path):
    deploy_map = {"app_a": ["server"], "app_b": ["dolly"], "app_c": [{"sites": ["alpaca"]}]}
    write(run / "meta.json", {"deploy_map": deploy_map})
    for site in ("dolly", "alpaca"):
        (run.parents[1] / f"{site}/simulate_job/app_{site}/of").write_text(site)
    resume_job(run, tmp_path / "job")
    assert json.loads((tmp_path / "job/meta.json").read_text())["deploy_map"] == deploy_map
    assert (tmp_path / "job/app_b/of").read_text() == "dolly"
    assert (tmp_path / "job/app_c/of").read_text() == "alpaca"
    assert rounds(tmp_path / "job", "app_a") == (1, 2)


def test_an_app_that_no_site_left_is_taken_from_the_jobs_folder(run: Path, tmp_path: Path):
    write(run / "meta.json", META | {"deploy_map": {"app": ["server"], "other": ["gone"]}})
    refused(run, tmp_path / "job", r"found no \['other'\]")
    shutil.copytree(JOBS / "sft", tmp_path / "original")
    shutil.copytree(tmp_path / "original/app", tmp_path / "original/other")
    write(tmp_path / "original/meta.json", META | {"deploy_map": {"app": ["server"], "other": ["gone"]}})
    resume_job(run, tmp_path / "job", job=tmp_path / "original")
    assert (tmp_path / "job/other/config").is_dir()


def test_a_deployed_job_carries_the_model_to_the_server_alone(download: Path, tmp_path: Path):
    save(download / "workspace", "best", 0, eval_loss=1.5)
    said = resume_job(download, tmp_path / "job")
    meta = json.loads((tmp_path / "job/meta.json").read_text())
    assert meta == META | {
        "name": "sft_resumed",
        "deploy_map": {"app_server": ["server"], "app": ["site-1", "site-2"]},
        "scope": "lab",
        "launcher_spec": {"site-1": {"docker": {}}},
    }
    carried = tmp_path / "job/app_server/earlier_run/global_model"
    assert {path.name for path in carried.iterdir()} == {"last", "best"}
    assert map_weights(carried / "last")["a"].tolist() == [1, 1]
    assert not (tmp_path / "job/app/earlier_run").exists()
    persistor = component(config(tmp_path / "job", app="app_server"), "persistor")
    assert persistor["resume_from"] == "{WORKSPACE}/{JOB_ID}/app_server/earlier_run"
    state = component(config(tmp_path / "job", "client"), "earlier_run_state")
    assert state == {"job_ids": [ID]}
    assert not list((tmp_path / "job").rglob(".__nvfl*")), "signatures of the earlier job"
    assert "study cancer: submit this one with --study" in said
    assert "names those that took part: site-1, site-2" in said


def test_a_deployed_job_can_be_continued_twice(download: Path, tmp_path: Path):
    """The second job ended before it had saved anything."""
    resume_job(download, tmp_path / "job")
    second = tmp_path / "download/second"
    shutil.copytree(tmp_path / "job", second / "job/tmpy")
    shutil.copytree(tmp_path / "job/app_server", second / "workspace/app_server")
    record = json.loads((tmp_path / "job/meta.json").read_text()) | {"job_id": "second"}
    write(second / "workspace/meta.json", record)
    write(second / "meta.json", record)
    resume_job(second, tmp_path / "again")
    state = component(config(tmp_path / "again", "client"), "earlier_run_state")
    assert state == {"job_ids": ["second", ID]}
    assert rounds(tmp_path / "again", "app_server") == (1, 2)
    assert json.loads((tmp_path / "again/meta.json").read_text())["deploy_map"] == record["deploy_map"]
    (carried,) = (tmp_path / "again").rglob("model.safetensors")
    assert carried.is_relative_to(tmp_path / "again/app_server/earlier_run/global_model/last")


def test_a_chain_of_jobs_names_the_latest_to_the_sites(tmp_path: Path):
    """One id more for each restart would grow without end."""
    config: dict = {}
    for number in range(3 * MOST_JOBS):
        continue_job_ids(config, f"job-{number}")
    state = earlier_state_of(config)["job_ids"]
    assert state == [f"job-{number}" for number in reversed(range(2 * MOST_JOBS, 3 * MOST_JOBS))]


def test_a_killed_servers_run_directory_is_continued_in_place(download: Path, tmp_path: Path):
    run_dir = (download / "workspace").rename(tmp_path / ID)
    resume_job(run_dir, tmp_path / "job")
    state = component(config(tmp_path / "job", "client"), "earlier_run_state")
    assert state == {"job_ids": [ID]}
    assert (tmp_path / "job/app/earlier_run/global_model/last").is_dir(), "no site is known"


def test_the_earlier_run_is_left_as_it_was(download: Path, tmp_path: Path):
    before = {path: path.read_bytes() for path in download.rglob("*") if path.is_file()}
    resume_job(download, tmp_path / "job")
    assert {path: path.read_bytes() for path in download.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", ["/home/me/site-packages", "../beside", "a/b", "..", ".", ""])
def test_a_run_from_elsewhere_does_not_choose_where_its_app_is_written(run: Path, tmp_path: Path, place: str):
    elsewhere = place.replace("/home/me", str(tmp_path / "home"))
    write(run / "meta.json", META | {"deploy_map": {elsewhere: ["@ALL"]}})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="deploy_map: expected names of apps"):
        resume_job(tmp_path / "ws", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "app_server/key",
        "app_server/config/deeper/key",
        "app_server",
        "global_model",
        "global_model/best",
        "trainer_state",
    ],
)
def test_a_link_in_a_run_from_elsewhere_carries_nothing_of_this_machine(run: Path, tmp_path: Path, name: str):
    home = tmp_path / "home"
    shutil.copytree(run / "app_server", home / "secret")
    shutil.copytree(run / "global_model/last", home / "secret/last")
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(home / "secret")
    with pytest.raises(ValueError, match=f"{name}: expected a file of the run itself, found a link"):
        resume_job(tmp_path / "ws", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"ws", "home"}


def test_what_a_run_says_of_itself_is_no_command_to_the_terminal(download: Path, tmp_path: Path):
    record = json.loads((download / "meta.json").read_text())
    write(download / "meta.json", record | {"study": "a\x1b[2J\nAll good"})
    told = resume_job(download, tmp_path / "out")
    assert "a\\x1b[2J\\nAll good" in told


def in_a_link(folder: Path, secret: Path) -> str:
    folder.mkdir()
    (folder / "global_model").symlink_to(secret / "global_model")
    return "{WORKSPACE}/{JOB_ID}/app_server/earlier_run"


@pytest.mark.parametrize(
    "place",
    [
        lambda _, secret: str(secret),
        lambda _, secret: f"{{WORKSPACE}}/../../{secret.parent.name}/{secret.name}",
        lambda _, secret: (
            f"{{WORKSPACE}}/{{JOB_ID}}/app_server/earlier_run/../../../../../home/{secret.name}"
        ),
        in_a_link,
    ],
    ids=["absolute", "below the workspace", "below the app", "a link"],
)
def test_a_deployed_run_from_elsewhere_names_no_model_of_this_machine(download, tmp_path: Path, place):
    secret = tmp_path / "home" / "server"
    save(secret, "last", 0)
    shutil.rmtree(download / "workspace/global_model")
    named = place(download / "workspace/app_server/earlier_run", secret)
    file = download / "job/tmpx/app/config/config_fed_server.json"
    content = json.loads(file.read_text())
    component(content, "persistor").update(resume_from=named)
    write(file, content)
    with pytest.raises(ValueError, match=r"resume_from: expected a folder that `nvflare-llm resume` made"):
        resume_job(download, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"download", "home"}


@pytest.mark.parametrize("folder", ["home/server", "home_earlier_run/dolly", "home/dolly_earlier_run"])
def test_a_simulated_run_from_elsewhere_takes_no_model_that_was_not_kept(run, tmp_path: Path, folder: str):
    save(tmp_path / folder, "last", 0)
    shutil.rmtree(run / "global_model")
    edit(run, lambda c: component(c, "persistor").update(resume_from=str(tmp_path / folder)))
    with pytest.raises(ValueError, match=r"resume_from: expected a folder that `nvflare-llm resume` made"):
        resume_job(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_simulated_run_from_elsewhere_takes_no_state_that_was_not_kept(run: Path, tmp_path: Path):
    keep(tmp_path / "home/trainer_state", "somebody else's")
    state = {
        "id": "s",
        "path": "nvflare_llm_components.widgets.EarlierRunState",
        "args": {"run_dir": str(tmp_path / "home")},
    }
    edit(run, lambda c: c["components"].append(state))
    with pytest.raises(ValueError, match="run_dir of EarlierRunState: expected a folder that"):
        resume_job(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
