"""Every kind of adapter through a federation; docs/adapters.md says what such a run said."""

from pathlib import Path

import pytest

from nvflare_llm_components.policy.adapters import check_peft_config
from tests.families.adapter_run import base_model
from tests.families.adapter_table import refusal, row
from tests.families.adapters import REFUSED, WORKING

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what PEFT's kinds say of themselves
PAGE = (Path(__file__).parents[2] / "docs/adapters.md").read_text()
FAST = ("LoRA on embed_tokens", "DoRA", "LoRA and modules_to_save", "VeRA", "Prefix tuning")
CASES = [pytest.param(kind, marks=[] if kind in FAST else [pytest.mark.slow], id=kind) for kind in WORKING]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", CASES)
def test_a_kind_is_federated_as_the_page_says(kind: str, base: Path, tmp_path: Path):
    check_peft_config(WORKING[kind])
    assert row(kind, WORKING[kind], base, tmp_path) in PAGE


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_is_refused_with_the_reason_on_the_page(kind: str, base: Path, tmp_path: Path):
    settings, reason = REFUSED[kind]
    line = refusal(kind, settings, base, tmp_path)
    assert reason in line
    assert line in PAGE


def test_the_page_has_a_line_for_each():
    assert all(f"| {kind} |" in PAGE for kind in (*WORKING, *REFUSED))
    assert PAGE.count("\n| ") - 2 == len(WORKING) + len(REFUSED)
