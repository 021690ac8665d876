"""The site's own policy: what its file may say, and what holds without it."""

from pathlib import Path

import pytest

from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import POLICY_FILE, SitePolicy, parsed, read_policy, sections


def test_without_a_file_the_defaults_hold(tmp_path: Path):
    assert read_policy(tmp_path) == SitePolicy()
    assert SitePolicy().places.hub == []
    assert SitePolicy().leaves.initial_weights == "named"


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path):
    (tmp_path / POLICY_FILE).write_text('[training]\nmax_length = 512\n[leaves]\nweights = "adapters"\n')
    policy = read_policy(tmp_path)
    assert (policy.training.max_length, policy.leaves.weights) == (512, "adapters")
    assert policy.places == SitePolicy().places


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[training]\nmax_lenght = 512",
            ["training.max_lenght: unknown", "Did you mean 'training.max_length'"],
        ),
        ("[trainig]\nmax_length = 512", ["trainig: unknown"]),
        ("max_length = 512", ["max_length: unknown", "training.max_length"]),
        ('[training]\nmax_length = "512"', ["training.max_length: expected", "found '512'"]),
        ("[training]\nmax_length = true", ["training.max_length: expected"]),
        ("[training]\nsteps = 0", ["training.steps: expected", "found 0"]),
        ("[leaves]\nmetric_digits = 0", ["leaves.metric_digits"]),
        ('[leaves]\nweights = "some"', ["leaves.weights: expected 'all', 'updates' or 'adapters'"]),
        ('[places]\ndata = "/data"', ["places.data: expected a valid list"]),
        ("[places\n", ["expected TOML"]),
    ],
)
def test_what_is_wrong_in_the_file_is_named(text: str, words: list[str], tmp_path: Path):
    (tmp_path / POLICY_FILE).write_text(text)
    with pytest.raises(PolicyError) as caught:
        read_policy(tmp_path)
    assert all(word in str(caught.value) for word in [str(tmp_path / POLICY_FILE), *words]), caught.value


@pytest.mark.parametrize("content", [b"\xff\xfe", None], ids=["bytes", "folder"])
def test_a_policy_that_cannot_be_read_lets_nothing_run(content: bytes | None, tmp_path: Path):
    if content is None:
        (tmp_path / POLICY_FILE).mkdir()
    else:
        (tmp_path / POLICY_FILE).write_bytes(content)
    with pytest.raises(PolicyError, match="No job runs until it can be read"):
        read_policy(tmp_path)


def test_every_key_says_what_it_means():
    for _, part in sections():
        assert all(field.description for field in part.model_fields.values())


@pytest.mark.parametrize(("digits", "told"), [(None, 1.23456), (3, 1.23), (1, 1.0)])
def test_metrics_have_the_digits_that_they_may_have(digits: int | None, told: float):
    text = "" if digits is None else f"[leaves]\nmetric_digits = {digits}"
    assert parsed(text, "test").leaves.rounded(1.23456) == told
