import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer

import nvflare_llm_components
from nvflare_llm_components.components import COMPONENTS
from nvflare_llm_components.tools.allow import allow
from nvflare_llm_components.tools.line_settings import write_line_settings

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


def authorizer(workspace: Path):
    """FLARE's own check, as a job's process in ``workspace`` makes it."""

    class Workspace:
        def get_resources_file_path(self):
            return str(workspace / "local/resources.json")

    check = ComponentPathAuthorizer().authorize_component_config
    return lambda path: check({"path": path}, workspace=Workspace())


def reachable() -> Iterator[str]:
    """Every callable that FLARE's loader could reach by a dotted path below the package."""
    package = nvflare_llm_components
    modules = [package.__name__]
    modules += [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    for name in modules:
        module = importlib.import_module(name)
        yield from (
            f"{name}.{attribute}" for attribute in dir(module) if callable(getattr(module, attribute))
        )


def test_new_simulator_workspace_gets_flares_default_list_and_the_components(tmp_path):
    (site,) = allow(tmp_path / "ws", new=True)
    assert site.resources == tmp_path / "ws/local/resources.json"
    assert policy(site.resources) == [*DEFAULT_CLASS_ALLOW_LIST, *COMPONENTS]
    assert f"to {len(DEFAULT_CLASS_ALLOW_LIST)} entries of FLARE's default list" in site.outcome
    assert all(path in site.outcome for path in COMPONENTS)


def test_allowing_twice_changes_nothing_and_says_so(tmp_path):
    (first,) = allow(tmp_path, new=True)
    content = first.resources.read_bytes()
    (second,) = allow(tmp_path)
    assert second.resources.read_bytes() == content
    assert not second.changed
    assert "nothing changed" in second.outcome


def test_flares_own_authorizer_accepts_the_executor_only_afterwards(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/resources.json").write_text("{}")
    with pytest.raises(Exception, match="is not in allow_list"):
        authorizer(tmp_path)(EXECUTOR["path"])
    allow(tmp_path)
    authorizer(tmp_path)(EXECUTOR["path"])


def test_flare_refuses_every_callable_of_the_package_but_its_components(tmp_path):
    allow(tmp_path, new=True)
    authorize = authorizer(tmp_path)
    paths = set(reachable())
    assert set(COMPONENTS) < paths
    assert len(paths) > 300
    for path in paths - set(COMPONENTS):
        with pytest.raises(Exception, match="is not in allow_list"):
            authorize(path)


def test_what_flare_can_reach_below_a_component_is_not_loaded():
    for path in COMPONENTS:
        with pytest.raises(ImportError):
            importlib.import_module(path)


def test_the_list_holds_the_components_and_no_function_or_import():
    for path in COMPONENTS:
        module, _, name = path.rpartition(".")
        component = getattr(importlib.import_module(module), name)
        assert inspect.isclass(component)
        assert component.__module__ == module


@pytest.mark.parametrize(
    "wide",
    ["nvflare_llm_components.", "nvflare_llm_components", "nvflare_llm_components.executors."],
)
def test_a_prefix_of_an_earlier_release_is_taken_out_and_told(wide, tmp_path):
    kit = make_kit(tmp_path, "client", {"class_allow_list": ["own.Y", wide]}, name="resources.json")
    (site,) = allow(kit)
    assert site.changed
    assert policy(site.resources) == ["own.Y", *COMPONENTS]
    assert f"removed {wide!r}" in site.outcome
    with pytest.raises(Exception, match="is not in allow_list"):
        authorizer(kit)("nvflare_llm_components.tools.shell._start")


def test_further_classes_are_added_beside_the_components(tmp_path):
    allow(tmp_path, new=True)
    (site,) = allow(tmp_path, ["torch.optim.SGD"])
    assert policy(site.resources)[-2:] == [COMPONENTS[-1], "torch.optim.SGD"]
    assert not allow(tmp_path, ["torch.optim.SGD"])[0].changed


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "torch",
        "torch..SGD",
        "torch.optim.SGD;",
        "torch.optim.",
        "torch.optim.SDG",
        "os.system",
        "subprocess.",
    ],
)
def test_what_is_no_installed_class_is_refused_and_nothing_is_written(entry, tmp_path):
    with pytest.raises(ValueError, match="--also"):
        allow(tmp_path, [entry], new=True)
    assert not (tmp_path / "local").exists()


def test_a_mistyped_path_is_refused_rather_than_made(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder.*--new"):
        allow(tmp_path / "kitz/site-1")
    assert not (tmp_path / "kitz").exists()


def test_startup_kit_with_only_a_default_file_keeps_all_of_it(tmp_path):
    default = {"format_version": 2, "class_allow_list": ["nvflare.a.B"], "client": {"retry_timeout": 30}}
    (site,) = allow(make_kit(tmp_path / "site-1", "client", default))
    assert json.loads(site.resources.read_text()) == default | {
        "class_allow_list": ["nvflare.a.B", *COMPONENTS]
    }
    assert json.loads((tmp_path / "site-1/local/resources.json.default").read_text()) == default


def test_what_the_site_configured_wins_over_the_default_file(tmp_path):
    kit = make_kit(tmp_path / "site-1", "client", {"class_allow_list": ["nvflare.default.X"]})
    (kit / "local/resources.json").write_text(json.dumps({"class_allow_list": ["own.Y"], "mine": 1}))
    (site,) = allow(kit)
    assert json.loads(site.resources.read_text()) == {"class_allow_list": ["own.Y", *COMPONENTS], "mine": 1}
    assert "1 entry of this site" in site.outcome


def test_every_server_and_client_kit_below_is_changed_and_no_admin_kit(tmp_path):
    prod = tmp_path / "example_project/prod_00"
    for name, role in {"server": "server", "site-1": "client", "site-2": "client", "a@b.c": "admin"}.items():
        make_kit(prod / name, role, {"format_version": 2})
    sites = allow(tmp_path)
    assert [site.resources.relative_to(prod).parts[0] for site in sites] == ["server", "site-1", "site-2"]
    assert all(set(COMPONENTS) <= set(policy(site.resources)) for site in sites)
    assert not (prod / "a@b.c/local/resources.json").exists()
    assert not (tmp_path / "local").exists()


def test_a_site_that_allows_everything_is_left_alone(tmp_path):
    kit = make_kit(tmp_path, "server", {"class_allow_list": ["*"]}, name="resources.json")
    write_line_settings(kit)
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
