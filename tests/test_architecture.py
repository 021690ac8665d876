"""Holds the import rule of the package: floors and columns, and nothing heavy at import."""

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "nvflare_llm_components"
THIRD_PARTY = {
    "nvflare",
    "torch",
    "transformers",
    "trl",
    "peft",
    "safetensors",
    "datasets",
    "typer",
    "matplotlib",
}


def _table() -> dict[str, tuple[set[str], set[str]]]:
    """Room: (rooms it may import beside itself, third-party packages it may not), as CONTRIBUTING.md says."""
    rows = re.findall(
        r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M
    )
    every = {name for name, *_ in rows}
    rules = {}
    for name, imports, refused in rows:
        rooms = set(re.findall(r"`([\w*]+)`", imports))
        packages = THIRD_PARTY if refused.strip() == "all" else set(refused.split())
        assert packages <= THIRD_PARTY, f"{name}: {packages - THIRD_PARTY} is not watched"
        rules[name] = ((every if "*" in rooms else rooms) | {name}, packages)
    return rules


RULES = _table()
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))


def part_of(module: Path) -> str:
    return module.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imports_of(module: Path) -> set[tuple[str, ...]]:
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports absolute"
            found |= {(*(node.module or "").split("."), alias.name) for alias in node.names}
    return found


def test_every_room_stands_in_the_table_of_contributing():
    assert {part_of(module) for module in MODULES} == set(RULES)


def test_the_map_is_the_same_in_the_package_and_in_contributing():
    docstring = ast.get_docstring(ast.parse((ROOT / PACKAGE / "__init__.py").read_text())) or ""
    (block,) = re.findall(r"```\n(floor 2.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert block == "".join(f"{line.strip()}\n" for line in docstring.splitlines() if line in indented(block))


def indented(block: str) -> list[str]:
    return [f"    {line}" for line in block.splitlines()]


def test_the_rooms_have_no_circle():
    graph = {room: ours - {room} for room, (ours, _) in RULES.items() if room not in ("tools", "cli")}
    graph["tools"] = graph["cli"] = set()
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT / PACKAGE)))
def test_module_keeps_to_its_column(module: Path):
    ours, refused = RULES[part_of(module)]
    for imported in imports_of(module):
        if imported[0] == PACKAGE and len(imported) > 1:
            assert imported[1] in ours | {"__version__"}, f"{module.name} imports {'.'.join(imported)}"
        assert imported[0] not in refused, f"{module.name} imports {'.'.join(imported)}"


@pytest.mark.parametrize(
    "package", sorted({m.parent for m in MODULES} - {ROOT / PACKAGE}), ids=lambda p: p.name
)
def test_a_packages_docstring_is_a_reading_order(package: Path):
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert {module for module in modules if f"`.{module}`" not in docstring} == set()


def test_no_room_is_above_a_quarter_of_the_package():
    lines = Counter[str]()
    for module in MODULES:
        lines[part_of(module)] += module.read_text().count("\n")
    (largest, size), *_ = lines.most_common()
    assert size <= lines.total() / 4, f"{largest}: {size} of {lines.total()} lines"


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, {PACKAGE}; print(sorted({THIRD_PARTY!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
