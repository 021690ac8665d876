"""The commands of a site's own policy."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvflare_llm_components.cli import app
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import POLICY_FILE, SitePolicy, parsed, sections
from nvflare_llm_components.tools.allow import allow
from nvflare_llm_components.tools.policy import check_job, init_policy, policy_text
from tests.tiny import save_tiny_model, write_site_data

JOBS = Path(__file__).parents[2] / "job_configs"
SHIPPED = sorted(folder.name for folder in JOBS.iterdir() if folder.is_dir())
OPTIMIZER = "torch.optim.SGD"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A provisioned site's kit, with a model and data where its environment says."""
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(save_tiny_model(tmp_path / "model")))
    monkeypatch.setenv("NVFLARE_LLM_DATA", str(write_site_data(tmp_path / "data", ["site-1"])))
    return kit(tmp_path / "kit", "client", {"client": {"fqsn": "site-1"}})


@pytest.fixture
def server(site: Path) -> Path:
    return kit(site.parent / "server", "server", {})


def kit(folder: Path, role: str, content: dict[str, object]) -> Path:
    (folder / "startup").mkdir(parents=True)
    (folder / "startup" / f"fed_{role}.json").write_text(json.dumps(content))
    (folder / "local").mkdir()
    allow(folder, also=[OPTIMIZER])
    return folder


def test_the_file_that_is_written_says_what_holds_without_it():
    assert parsed(policy_text(), "text") == SitePolicy()


def test_every_key_stands_in_the_file_with_what_it_means():
    text = policy_text()
    for name, part in sections():
        assert f"[{name}]" in text
        for key in part.model_fields:
            assert f"\n{key} = " in text or f"\n# {key} =" in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_init_writes_once_and_takes_choices(site: Path):
    path = init_policy(site, ["training.max_length=512", 'leaves.weights = "adapters"'])
    policy = parsed(path.read_text(), "text")
    assert (policy.training.max_length, policy.leaves.weights) == (512, "adapters")
    with pytest.raises(FileExistsError, match="there is a policy already"):
        init_policy(site)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.max_lenght=1", "training.max_lenght"),
        ("x", "section.key=value"),
        ("leaves.weights=1", "weights"),
    ],
)
def test_a_wrong_choice_writes_nothing(setting: str, words: str, site: Path):
    with pytest.raises(ValueError, match=words):
        init_policy(site, [setting])
    assert not (site / "local" / POLICY_FILE).exists()


def test_init_wants_a_kit(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a startup kit"):
        init_policy(tmp_path / "nowhere")
    assert init_policy(tmp_path / "nowhere", new=True).is_file()


@pytest.mark.parametrize("job", SHIPPED)
def test_every_shipped_job_is_accepted_without_a_file(job: str, site: Path, server: Path):
    assert check_job(JOBS / job, site) == []
    assert check_job(JOBS / job, server) == []


def test_what_would_be_refused_is_said_beforehand(site: Path, monkeypatch: pytest.MonkeyPatch):
    init_policy(site, ["training.max_length=128"])
    (found,) = check_job(JOBS / "sft", site)
    assert found.startswith("HFSFTExecutor: sft_config.max_length: this site's policy expects at most 128")
    monkeypatch.setenv("NVFLARE_LLM_DATA", "/nowhere")
    (site / "local" / POLICY_FILE).write_text('[places]\ndata = ["/data"]')
    (found,) = check_job(JOBS / "sft", site)
    assert "train_data: expected what this site lets jobs use (/data), found '/nowhere/site-1/tr" in found


def test_variables_that_are_not_set_are_named(site: Path, server: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NVFLARE_LLM_MODEL")
    for folder in (site, server):
        (found,) = check_job(JOBS / "sft", folder)
        assert "model_name_or_path: expected a path or name, found None. Set NVFLARE_LLM_MODEL" in found


def test_code_and_classes_that_the_site_does_not_allow_are_named(site: Path, tmp_path: Path):
    job = tmp_path / "job"
    (job / "app/config").mkdir(parents=True)
    (job / "app/custom").mkdir()
    (job / "meta.json").write_text(json.dumps({"deploy_map": {"app": ["@ALL"]}}))
    config = {"components": [{"id": "x", "path": "subprocess.Popen", "args": {"args": "id"}}]}
    (job / "app/config/config_fed_client.json").write_text(json.dumps(config))
    found = check_job(job, site)
    assert "found code: it needs the right byoc" in found[0]
    assert found[1].startswith("subprocess.Popen: expected a class of class_allow_list")


def test_an_unknown_key_of_the_policy_is_named(site: Path):
    (site / "local" / POLICY_FILE).write_text("[training]\nmax_lenght = 1")
    with pytest.raises(PolicyError, match=r"Did you mean 'training\.max_length'"):
        check_job(JOBS / "sft", site)


@pytest.mark.parametrize(
    ("job", "words"), [("nowhere", "found no meta.json"), ("other", "expected an app for site 'site-1'")]
)
def test_what_is_no_job_of_the_site_is_named(job: str, words: str, site: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/meta.json").write_text(json.dumps({"deploy_map": {"app": ["site-2"]}}))
    with pytest.raises(ValueError, match=words):
        check_job(tmp_path / job, site)


def test_the_commands_tell_by_their_exit_code(site: Path):
    run = CliRunner().invoke
    check = ["policy", "check", str(JOBS / "sft"), "--site", str(site)]
    accepted = run(app, check)
    assert (accepted.exit_code, "accepted by" in accepted.output) == (0, True)
    assert run(app, ["policy", "init", str(site), "--set", 'leaves.weights="adapters"']).exit_code == 0
    refused = run(app, check)
    assert (refused.exit_code, "expects an adapter" in refused.output) == (1, True)
    assert run(app, ["policy", "check", str(JOBS / "sft"), "--site", str(site / "startup")]).exit_code == 2


def test_a_simulated_site_has_no_name_of_its_own(tmp_path: Path, site: Path):
    workspace = tmp_path / "ws"
    allow(workspace, new=True)
    with pytest.raises(ValueError, match="--name"):
        check_job(JOBS / "sft", workspace)
    assert check_job(JOBS / "sft", workspace, "dolly") == []


def test_a_path_as_the_name_of_an_app_is_refused(site: Path, tmp_path: Path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job/meta.json").write_text(json.dumps({"deploy_map": {str(tmp_path / "other"): ["@ALL"]}}))
    with pytest.raises(ValueError, match="deploy_map: expected names of apps"):
        check_job(tmp_path / "job", site)


def test_what_a_job_is_refused_for_is_no_command_to_the_terminal(site: Path, tmp_path: Path):
    components = [{"id": "a", "path": "evil.\x1b]0;pwned\x07Class", "args": {}}]
    config = tmp_path / "job/app/config/config_fed_client.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"format_version": 2, "components": components}))
    (tmp_path / "job/meta.json").write_text(json.dumps({"deploy_map": {"app": ["@ALL"]}}))
    told = CliRunner().invoke(app, ["policy", "check", str(tmp_path / "job"), "--site", str(site)])
    assert "evil.\\x1b]0;pwned\\x07Class" in told.output


@pytest.mark.parametrize(
    ("setting", "refusal"),
    [
        ("limits.model_gib=0.000001", "expects weights of at most 1e-06 GiB once loaded"),
        ("limits.free_disk_gib=1e12", "expects at least 1e+12 GiB free"),
    ],
)
def test_what_the_machine_does_not_give_is_told_beforehand(site: Path, setting: str, refusal: str):
    init_policy(site, [setting])
    (found,) = check_job(JOBS / "sft", site)
    assert refusal in found


def test_a_configuration_beside_the_json_is_told(site: Path, tmp_path: Path):
    job = shutil.copytree(JOBS / "sft", tmp_path / "job")
    assert check_job(job, site) == []
    next(job.rglob("config_fed_client.json")).with_suffix(".conf").write_text('include file("/etc/passwd")')
    (told,) = check_job(job, site)
    assert "expected a job of JSON alone, found config_fed_client.conf" in told
