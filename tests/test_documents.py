"""What README and docs show is true: commands parse, JSON is JSON, links lead somewhere, examples run."""

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
import yaml

from benchmarks import figures
from nvflare_llm_components.cli import app
from nvflare_llm_components.components import COMPONENTS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "job_configs/README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
RULES = [name for names in re.findall(r"^([a-z][a-z -]*):", MAKEFILE, re.M) for name in names.split()]
MAKE_TARGETS = set(RULES)
COMMANDS = typer.main.get_command(app)


def blocks(*languages: str) -> list[object]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            if block.group(1) in languages:
                line = text[: block.start()].count("\n") + 1
                found.append(pytest.param(block.group(2), id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def words_of(line: str) -> list[str]:
    """A shell line's words, without what is set before it or piped behind it."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    ends = (number for number, word in enumerate(words) if word in ("|", ">", "&&", ";", "&"))
    return words[: next(ends, len(words))]


def check_ours(words: list[str]) -> None:
    """Let the command's own parser read its words, and run nothing."""
    group: click.Command = COMMANDS
    while isinstance(group, click.Group):
        assert words, "a command without its verb"
        if words[0] == "--version" or "--help" in words:
            return
        name = words.pop(0)
        assert name in group.commands, f"'{name}': expected one of {sorted(group.commands)}"
        group = group.commands[name]
    group.make_context(group.name, list(words))


def test_make_has_one_rule_for_each_target_that_it_names():
    named = [name for names in re.findall(r"^\.PHONY:(.*)$", MAKEFILE, re.M) for name in names.split()]
    assert sorted(named) == sorted(RULES)


@pytest.mark.parametrize("block", blocks("bash", "sh", "shell"))
def test_commands_are_ones_that_exist(block: str):
    for line in block.replace("\\\n", " ").splitlines():
        words = words_of(line.removeprefix("$ "))
        if not words:
            continue
        program, *rest = words
        if program == "nvflare-llm":
            check_ours(rest)
        elif program == "make":
            assert {word for word in rest if "=" not in word} <= MAKE_TARGETS, line
        elif (
            program.startswith("python") and rest[:2] == ["-m", rest[1]] and rest[1].startswith("benchmarks")
        ):
            assert (ROOT / (rest[1].replace(".", "/") + ".py")).is_file(), line
        for word in rest:
            if word.startswith("job_configs/"):
                assert (ROOT / word).exists(), f"{word} in: {line}"


@pytest.mark.parametrize("block", blocks("json"))
def test_json_is_json_and_names_components_that_exist(block: str):
    def paths(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                yield value["path"]
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from paths(item)

    for path in paths(json.loads(block)):
        module, _, name = path.rpartition(".")
        if path.startswith("nvflare_llm_components"):
            assert path in COMPONENTS, path
        elif path.startswith("nvflare."):
            assert hasattr(importlib.import_module(module), name), path


@pytest.mark.parametrize("block", blocks("python"))
def test_python_is_python_and_imports_what_exists(block: str):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_walk_names_files_that_exist():
    walk = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./]+\.py)`", walk))
    assert len(named) > 15
    for name in named:
        assert (ROOT / name).is_file() or (ROOT / "nvflare_llm_components" / name).is_file(), name


def test_the_walk_names_functions_and_classes_that_exist():
    walk = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]+\.py)`\s+\(`(\w+)`\)", walk)
    assert len(named) > 5
    for file, name in named:
        tree = ast.parse((ROOT / "nvflare_llm_components" / file).read_text(encoding="utf-8"))
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{file}: {name}"


def test_the_sites_nav_names_each_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [page for room in nav for pages in room.values() for entry in pages for page in entry.values()]
    assert sorted(named) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")
    )


def test_the_reference_names_classes_that_exist():
    for path in re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.M):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_figures_of_todays_records(page: Path):
    text = page.read_text(encoding="utf-8")
    assert text == figures.written(text, figures.PAGES[page]()), "run: python -m benchmarks.figures --write"
