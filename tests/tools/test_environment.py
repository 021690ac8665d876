"""The package changes no process; the commands' own processes are given what torch reads at its start."""

import os
import subprocess
import sys

import pytest

from nvflare_llm_components.tools.environment import RECOMMENDED, with_recommended

SHOW = f"import os; print({{name: os.environ.get(name) for name in {tuple(RECOMMENDED)}}})"


def shown_after(code: str, given: dict[str, str]) -> dict[str, str | None]:
    clean = {name: value for name, value in os.environ.items() if name not in RECOMMENDED}
    command = [sys.executable, "-c", f"{code}\n{SHOW}"]
    output = subprocess.run(command, env=clean | given, check=True, capture_output=True, text=True).stdout
    return dict(eval(output))


def test_importing_the_package_and_its_components_changes_no_variable():
    code = "import nvflare_llm_components.filters, nvflare_llm_components.persistors"
    assert shown_after(code, {}) == dict.fromkeys(RECOMMENDED)


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_what_the_user_has_set_stays(given: dict[str, str]):
    assert with_recommended(given) == RECOMMENDED | given


def test_the_command_sets_them_before_torch_is_loaded():
    code = "import sys; from nvflare_llm_components.cli.app import main; main()"
    code += "; assert 'torch' not in sys.modules"
    assert shown_after(code, {"THP_MEM_ALLOC_ENABLE": "0"}) == RECOMMENDED | {"THP_MEM_ALLOC_ENABLE": "0"}
