"""What a site accepts of a job."""

from pathlib import Path

import pytest
from nvflare.apis.fl_constant import FLContextKey, ProcessType, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.workspace import Workspace

from nvflare_llm_components.flare.site import (
    accepted_run,
    accepted_start,
    policy_of,
)
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import POLICY_FILE, SitePolicy
from tests.tiny import save_tiny_model


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    for name in ("kit/startup", "kit/local", "kit/job", "kit/old"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "kit"


def context(kit: Path, process: str = ProcessType.SERVER_JOB, site: str = "server") -> FLContext:
    fl_ctx = FLContext()
    fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, Workspace(str(kit), site), private=True)
    fl_ctx.set_prop(FLContextKey.PROCESS_TYPE, process, private=True)
    fl_ctx.set_prop(ReservedKey.RUN_NUM, "job", private=False)
    return fl_ctx


def test_the_policy_is_that_of_the_kit(kit: Path):
    assert policy_of(context(kit)) == SitePolicy()
    (kit / "local" / POLICY_FILE).write_text("[training]\nrounds = 3")
    assert policy_of(context(kit)).training.rounds == 3
    assert policy_of(FLContext()) == SitePolicy()


def test_a_server_starts_from_what_its_environment_names_or_what_lies_below(kit: Path, monkeypatch):
    model = save_tiny_model(kit.parent / "models/a")
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(kit.parent / "models"))
    assert accepted_start(context(kit), str(model)) == str(model)
    assert accepted_start(context(kit), "a") == str(model)
    with pytest.raises(PolicyError, match="NVFLARE_LLM_MODEL"):
        accepted_start(context(kit), "/etc")
    assert accepted_start(context(kit), None) is None  # left to who opens it, and says so


def test_a_sites_persistor_sends_out_no_model_below_the_one_that_is_named(kit: Path, monkeypatch):
    """As in Swarm, where the first model is a site's."""
    model = save_tiny_model(kit.parent / "models/a")
    site = context(kit, ProcessType.CLIENT_JOB, "site-1")
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(model))
    assert accepted_start(site, str(model)) == str(model)
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(model.parent))
    with pytest.raises(PolicyError, match="this site's own weights would be sent"):
        accepted_start(site, str(model))


def test_an_earlier_run_is_one_of_the_kit_or_came_with_the_app(kit: Path):
    carried = kit / "job/app_server/earlier_run"
    carried.mkdir(parents=True)
    for run in (kit / "old", carried):
        assert accepted_run(context(kit), "resume_from", str(run), may_be_brought=True) == run
    with pytest.raises(PolicyError, match="resume_from: expected a run directory"):
        accepted_run(context(kit), "resume_from", str(kit.parent))
    with pytest.raises(PolicyError, match="resume_from"):
        accepted_run(FLContext(), "resume_from", str(kit / "old"))


def test_a_job_brings_a_model_to_the_server_but_nowhere_what_only_the_kit_keeps(kit: Path):
    """A state counts rounds and holds weights: one that the job wrote itself could claim anything."""
    site = context(kit, ProcessType.CLIENT_JOB, "site-1")
    for fl_ctx, app, may_be_brought in (
        (context(kit), "app_server", False),
        (site, "app_site-1", False),
        (site, "app_site-1", True),
    ):
        brought = kit / "job" / app / "old"
        brought.mkdir(parents=True, exist_ok=True)
        with pytest.raises(PolicyError, match="expected a run directory of this site's own workspace"):
            accepted_run(fl_ctx, "run_dir", str(brought), may_be_brought=may_be_brought)
        assert accepted_run(fl_ctx, "run_dir", str(kit / "old"), may_be_brought=may_be_brought)
