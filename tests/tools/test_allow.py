import json
from pathlib import Path

import pytest
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer

from nvflare_llm_components.tools.allow import PREFIX, allow

EXECUTOR = {"path": "nvflare_llm_components.executors.HFSFTExecutor"}


def policy(resources: Path) -> list[str]:
    return json.loads(resources.read_text())["class_allow_list"]


def make_kit(folder: Path, role: str, resources: dict | None, name: str = "resources.json.default") -> Path:
    (folder / "startup").mkdir(parents=True)
    (folder / "startup" / f"fed_{role}.json").write_text("{}")
    (folder / "local").mkdir()
    if resources is not None:
        (folder / "local" / name).write_text(json.dumps(resources))
    return folder


def test_new_simulator_workspace_gets_flares_default_list_and_the_package(tmp_path):
    (site,) = allow(tmp_path / "ws")
    assert site.resources == tmp_path / "ws/local/resources.json"
    assert policy(site.resources) == [*DEFAULT_CLASS_ALLOW_LIST, PREFIX]
    assert (
        f"added '{PREFIX}' to {len(DEFAULT_CLASS_ALLOW_LIST)} entries of FLARE's default list" in site.outcome
    )


def test_allowing_twice_changes_nothing_and_says_so(tmp_path):
    (first,) = allow(tmp_path)
    content = first.resources.read_bytes()
    (second,) = allow(tmp_path)
    assert second.resources.read_bytes() == content
    assert not second.changed
    assert "nothing changed" in second.outcome


def test_flares_own_authorizer_accepts_the_executor_only_afterwards(tmp_path):
    class Workspace:
        def get_resources_file_path(self):
            return str(tmp_path / "local/resources.json")

    (tmp_path / "local").mkdir()
    (tmp_path / "local/resources.json").write_text("{}")
    authorize = ComponentPathAuthorizer().authorize_component_config
    with pytest.raises(Exception, match="is not in allow_list"):
        authorize(EXECUTOR, workspace=Workspace())
    allow(tmp_path)
    authorize(EXECUTOR, workspace=Workspace())


def test_further_classes_are_added_beside_the_package(tmp_path):
    allow(tmp_path)
    (site,) = allow(tmp_path, ["torch.optim.SGD", "torch.optim.lr_scheduler."])
    assert policy(site.resources)[-3:] == [PREFIX, "torch.optim.SGD", "torch.optim.lr_scheduler."]
    assert not allow(tmp_path, ["torch.optim.SGD"])[0].changed


@pytest.mark.parametrize("entry", ["", "*", "torch", "torch..SGD", "torch.optim.SGD;"])
def test_what_is_no_class_or_package_is_refused(entry, tmp_path):
    with pytest.raises(ValueError, match="--also"):
        allow(tmp_path, [entry])


def test_startup_kit_with_only_a_default_file_keeps_all_of_it(tmp_path):
    default = {"format_version": 2, "class_allow_list": ["nvflare.a.B"], "client": {"retry_timeout": 30}}
    (site,) = allow(make_kit(tmp_path / "site-1", "client", default))
    assert json.loads(site.resources.read_text()) == default | {"class_allow_list": ["nvflare.a.B", PREFIX]}
    assert json.loads((tmp_path / "site-1/local/resources.json.default").read_text()) == default


def test_what_the_site_configured_wins_over_the_default_file(tmp_path):
    kit = make_kit(tmp_path / "site-1", "client", {"class_allow_list": ["nvflare.default.X"]})
    (kit / "local/resources.json").write_text(json.dumps({"class_allow_list": ["own.Y"], "mine": 1}))
    (site,) = allow(kit)
    assert json.loads(site.resources.read_text()) == {"class_allow_list": ["own.Y", PREFIX], "mine": 1}
    assert "1 entries of this site" in site.outcome


def test_every_server_and_client_kit_below_is_changed_and_no_admin_kit(tmp_path):
    prod = tmp_path / "example_project/prod_00"
    for name, role in {"server": "server", "site-1": "client", "site-2": "client", "a@b.c": "admin"}.items():
        make_kit(prod / name, role, {"format_version": 2})
    sites = allow(tmp_path)
    assert [site.resources.relative_to(prod).parts[0] for site in sites] == ["server", "site-1", "site-2"]
    assert all(PREFIX in policy(site.resources) for site in sites)
    assert not (prod / "a@b.c/local/resources.json").exists()
    assert not (tmp_path / "local").exists()


def test_a_site_that_allows_everything_is_left_alone(tmp_path):
    kit = make_kit(tmp_path, "server", {"class_allow_list": ["*"]}, name="resources.json")
    (site,) = allow(kit)
    assert not site.changed
    assert policy(site.resources) == ["*"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops", "expected JSON"),
        ("[]", "expected a JSON object. Found list"),
        ('{"class_allow_list": "x"}', "`class_allow_list` should be a list. Found str"),
    ],
)
def test_a_broken_policy_is_refused_and_left_as_it_was(tmp_path, content, message):
    (tmp_path / "local").mkdir()
    file = tmp_path / "local/resources.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        allow(tmp_path)
    assert file.read_text() == content


def test_a_file_is_no_workspace(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="Found a file"):
        allow(tmp_path / "file")
