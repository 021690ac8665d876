"""Where a job may read: below what the site names, links followed, and nowhere else."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvflare_llm_components.policy.places import JobPlaces, earlier_run
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import Places


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site with data, two models, an app, and what is none of a job's business."""
    for name in ("data/dolly", "models/small", "models/private", "app/rows", "secret"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/dolly/rows.jsonl", "app/rows/rows.jsonl", "secret/rows.jsonl"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def places(site: Path, model: str = "models/small", **policy: object) -> JobPlaces:
    environ = {"NVFLARE_LLM_DATA": str(site / "data"), "NVFLARE_LLM_MODEL": str(site / model)}
    return JobPlaces(Places.model_validate(policy), site / "app", environ)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("{site}/data/dolly/rows.jsonl", "data/dolly/rows.jsonl"),
        ("{site}/data/../data/dolly/rows.jsonl", "data/dolly/rows.jsonl"),
        ("{site}/data/missing.jsonl", "data/missing.jsonl"),
        ("{site}/app/rows/rows.jsonl", "app/rows/rows.jsonl"),
        ("rows/rows.jsonl", "app/rows/rows.jsonl"),
        ("dolly/rows.jsonl", "data/dolly/rows.jsonl"),
    ],
)
def test_what_a_job_may_read(value: str, found: str, site: Path):
    assert places(site).data_file("train_data", value.format(site=site)) == site / found


@pytest.mark.parametrize(
    "value",
    [
        "/etc/passwd",
        "{site}/secret/rows.jsonl",
        "{site}/data/../secret/rows.jsonl",
        "../secret/rows.jsonl",
        "{site}/models/small/config.json",
        "{site}/data-of-another/rows.jsonl",
        "~/rows.jsonl",
        "/proc/self/environ",
        "a\0b",
        "x" * 5000,
        "",
    ],
)
def test_what_a_job_may_not_read(value: str, site: Path):
    with pytest.raises(PolicyError, match="train_data: expected"):
        places(site).data_file("train_data", value.format(site=site))


@pytest.mark.parametrize("link", ["data/link.jsonl", "app/link.jsonl"])
def test_a_link_leads_nowhere_else(link: str, site: Path):
    (site / link).symlink_to(site / "secret/rows.jsonl")
    with pytest.raises(PolicyError, match="train_data"):
        places(site).data_file("train_data", str(site / link))
    assert not places(site).data_file("train_data", "link.jsonl").exists()


def test_a_root_may_be_a_link_itself(site: Path):
    (site / "current").symlink_to(site / "models/private")
    model = places(site, "current").model("model_name_or_path", str(site / "current"))
    assert (model.folder, model.is_named) == (site / "models/private", True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["..", ".", "data", "dolly", "app", "secret", "rows.jsonl", "~"]), max_size=7
    )
)
def test_whatever_is_named_lies_below_a_root(parts: list[str], site: Path):
    for value in ("/".join(parts), str(site / "data" / "/".join(parts))):
        try:
            found = places(site).data_file("train_data", value)
        except PolicyError:
            continue
        assert found.is_relative_to(site / "data") or found.is_relative_to(site / "app")


def test_a_site_may_let_jobs_name_files_only(site: Path):
    strict = places(site, names_only=True, job_files=False)
    assert strict.data_file("train_data", "dolly/rows.jsonl") == site / "data/dolly/rows.jsonl"
    for value in (f"{site}/data/dolly/rows.jsonl", "rows/rows.jsonl/../../../secret/rows.jsonl"):
        with pytest.raises(PolicyError, match="train_data"):
            strict.data_file("train_data", value)
    # What the app holds is not looked at: the name is one below the root, where there is nothing.
    assert strict.data_file("train_data", "rows/rows.jsonl") == site / "data/rows/rows.jsonl"


def test_a_site_without_its_variables_lets_jobs_read_their_own_files_only(site: Path):
    bare = JobPlaces(Places(), site / "app", {"NVFLARE_LLM_DATA": ""})
    assert bare.data_file("train_data", "rows/rows.jsonl") == site / "app/rows/rows.jsonl"
    for value in (str(Path.cwd()), f"{site}/data/dolly/rows.jsonl"):
        with pytest.raises(PolicyError, match="NVFLARE_LLM_DATA"):
            bare.data_file("train_data", value)


def test_a_model_is_named_exactly_or_lies_below(site: Path):
    one = places(site).model("model_name_or_path", str(site / "models/small"))
    assert (one.is_named, one.is_brought) == (True, False)
    below = places(site, "models").model("model_name_or_path", str(site / "models/private"))
    assert (below.is_named, below.is_brought) == (False, False)
    (site / "app/model").mkdir()
    brought = places(site).model("model_name_or_path", "model")
    assert (brought.folder, brought.is_brought) == (site / "app/model", True)
    with pytest.raises(PolicyError, match="NVFLARE_LLM_MODEL"):
        places(site).model("model_name_or_path", str(site / "models/private"))


@pytest.mark.parametrize(
    "name", ["org/name", "name", "../secret", "org/../..", "https://evil/x", "a/b/c", "org/na me"]
)
def test_no_hub_name_is_allowed_unless_the_site_says_so(name: str, site: Path):
    with pytest.raises(PolicyError, match="model_name_or_path: expected what this site lets jobs use"):
        places(site).model("model_name_or_path", name)


def test_hub_names_that_the_site_allows(site: Path):
    listed = places(site, hub=["meta-llama/*", "gpt2"])
    assert listed.model("m", "meta-llama/Llama-3.2-1B").name_or_path == "meta-llama/Llama-3.2-1B"
    assert listed.model("m", "gpt2").folder is None
    with pytest.raises(PolicyError, match="meta-llama/\\*"):
        listed.model("m", "other/model")
    by_environment = JobPlaces(Places(), site / "app", {"NVFLARE_LLM_MODEL": "org/name"})
    assert by_environment.model("m", "org/name").is_named


def test_a_folder_of_the_working_directory_is_no_hub_name(site: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(site)
    with pytest.raises(PolicyError, match="model_name_or_path"):
        places(site, hub=["*"]).model("model_name_or_path", "secret")


class TestEarlierRun:
    """What a site kept of a job, for the job that continues it."""

    @pytest.fixture
    def kit(self, tmp_path: Path) -> Path:
        for name in ("kit/old/app_site-1", "kit/new", "kit/local", "other/job", "job_earlier_run/site-1"):
            (tmp_path / name).mkdir(parents=True)
        for job in ("old", "new"):
            (tmp_path / "kit" / job / "meta.json").write_text(
                '{"submitter_name": "ann", "submitter_org": "lab", "study": "default"}'
            )
        return tmp_path / "kit"

    def test_a_run_of_the_own_workspace(self, kit: Path):
        assert earlier_run("run_dir", str(kit / "old"), kit / "new") == kit / "old"
        other = kit.parent / "other"
        assert earlier_run("run_dir", str(other / "job"), kit / "new", [other]) == other / "job"

    @pytest.mark.parametrize(
        "value",
        [
            "old",
            "{kit}",
            "{kit}/local",
            "{kit}/old/app_site-1",
            "{kit}/../other/job",
            "/etc",
            "{kit}/old/../..",
        ],
    )
    def test_any_other_folder_is_refused(self, value: str, kit: Path):
        with pytest.raises(PolicyError, match="run_dir: expected a"):
            earlier_run("run_dir", value.format(kit=kit), kit / "new")

    def test_a_link_to_elsewhere_is_refused(self, kit: Path):
        (kit / "linked").symlink_to(kit.parent / "other/job")
        with pytest.raises(PolicyError, match="of this site's own workspace"):
            earlier_run("run_dir", str(kit / "linked"), kit / "new")

    def test_in_the_simulator_a_site_continues_what_was_kept_of_it(self, kit: Path):
        kept = kit.parent / "job_earlier_run/site-1"
        assert earlier_run("run_dir", str(kept), site_name="site-1") == kept
        for value, name in ((kept, "site-2"), (kit.parent / "other/job", "job")):
            with pytest.raises(PolicyError, match="run_dir"):
                earlier_run("run_dir", str(value), site_name=name)

    @pytest.mark.parametrize("key", ["submitter_name", "submitter_org", "study"])
    def test_another_owners_run_is_refused(self, key: str, kit: Path):
        record = json.loads((kit / "old/meta.json").read_text())
        (kit / "old/meta.json").write_text(json.dumps(record | {key: "other"}))
        with pytest.raises(PolicyError, match=f"of the same submitter, found another {key}"):
            earlier_run("run_dir", str(kit / "old"), kit / "new")
        (kit / "old/meta.json").unlink()
        with pytest.raises(PolicyError, match="of the same submitter"):
            earlier_run("run_dir", str(kit / "old"), kit / "new")
