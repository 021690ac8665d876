"""Holds the import rule of the package: floors and columns, and nothing heavy at import."""

import ast
import subprocess
import sys
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
HALL = {
    "aggregators",
    "checkpoint",
    "conventions",
    "data",
    "executor_context",
    "executors",
    "filter_context",
    "filters",
    "memory",
    "persistor_context",
    "persistors",
    "quantization",
    "server_model",
    "tools",
    "training",
}

# part of the package: (parts of ours it may import, watched third-party packages it may not)
RULES: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), THIRD_PARTY),
    "training": ({"training"}, {"nvflare", "typer", "matplotlib"}),
    "quantization": (
        {"quantization"},
        {"nvflare", "transformers", "trl", "peft", "datasets", "typer", "matplotlib"},
    ),
    "checkpoint": ({"checkpoint"}, {"nvflare", "trl", "datasets", "typer", "matplotlib"}),
    "aggregators": (set(), {"transformers", "trl", "peft", "datasets", "typer", "matplotlib"}),
    "conventions": (set(), THIRD_PARTY - {"nvflare"}),
    "executor_context": (
        {"conventions"},
        {"torch", "transformers", "trl", "peft", "datasets", "typer", "matplotlib"},
    ),
    "executors": ({"conventions", "executor_context", "memory", "training"}, {"trl", "typer", "matplotlib"}),
    "filter_context": (
        {"conventions", "quantization"},
        {"transformers", "trl", "peft", "datasets", "typer", "matplotlib"},
    ),
    "filters": (
        {"conventions", "filter_context", "memory", "quantization"},
        {"transformers", "trl", "peft", "datasets", "typer", "matplotlib"},
    ),
    "memory": (set(), THIRD_PARTY),
    "persistor_context": (
        {"conventions", "memory"},
        {"transformers", "trl", "peft", "datasets", "typer", "matplotlib"},
    ),
    "persistors": (
        {"checkpoint", "conventions", "memory", "persistor_context"},
        {"transformers", "trl", "peft", "datasets", "typer", "matplotlib"},
    ),
    "server_model": ({"checkpoint"}, {"transformers", "trl", "peft", "datasets", "typer", "matplotlib"}),
    "data": ({"data"}, {"nvflare", "trl", "peft", "typer"}),
    "tools": (HALL, {"typer"}),
    "cli": (HALL, {"torch", "transformers", "trl", "matplotlib"}),
}

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


def test_every_module_is_named_in_the_table():
    assert {part_of(module) for module in MODULES} == set(RULES)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT / PACKAGE)))
def test_module_keeps_to_its_column(module: Path):
    ours, refused = RULES[part_of(module)]
    for imported in imports_of(module):
        if imported[0] == PACKAGE and len(imported) > 1:
            assert imported[1] in ours | {"__version__"}, f"{module.name} imports {'.'.join(imported)}"
        assert imported[0] not in refused, f"{module.name} imports {'.'.join(imported)}"


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, {PACKAGE}; print(sorted({THIRD_PARTY!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
