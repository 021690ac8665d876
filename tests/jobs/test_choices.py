"""The choices are documented: each option and each shipped start, each mistake and its sentence."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nvflare_llm_components.jobs.choices import WORKFLOWS, JobChoices, changed, kind_of
from tests.tools.checks.test_check import MISTAKES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("choice", fields(JobChoices), ids=lambda choice: choice.name)
def test_every_option_stands_in_the_docs_with_its_sentence(choice):
    table = (DOCS / "jobs.md").read_text()
    option = f"--{choice.name.replace('_', '-')}"
    row = next(line for line in table.splitlines() if line.startswith(f"| `{option}` |"))
    assert row.endswith(f"| {choice.metadata['help']} |")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_stands_in_the_docs_with_its_sentence(mistake):
    _, sentence = MISTAKES[mistake]
    row = f"| {mistake} | `{re.sub('^(error|warning) ', '', sentence)}` |"
    assert row in (DOCS / "troubleshooting.md").read_text().splitlines()


@pytest.mark.parametrize("workflow", WORKFLOWS)
@pytest.mark.parametrize("rounded", [{"precision": "bf16"}, {"overrides": {"mlp": "int8"}}, {}])
def test_what_is_rounded_is_a_change_wherever_somebody_adds_it(rounded: dict, workflow: str):
    expected = workflow != "swarm" and (rounded or workflow == "fedopt")
    assert (JobChoices(workflow=workflow, **rounded).params_type == "DIFF") == bool(expected)


def test_kinds_and_changes():
    assert {kind_of(choice) for choice in fields(JobChoices)} == {str, int, float, bool, dict}
    assert changed(JobChoices()) == {}
    assert changed(JobChoices(rounds=9, lora={"r": 4})) == {"rounds": 9, "lora": {"r": 4}}
    assert JobChoices(sites="3").site_names == ["site-1", "site-2", "site-3"]
    assert JobChoices(sites=" a, b ").site_names == ["a", "b"]
