"""What of a job's metrics and curves may leave a site, and how long its tasks may take."""

import pytest

from nvflare_llm_components.policy.job import AcceptedTraining
from nvflare_llm_components.policy.places import ModelPlace
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import parsed


def gate(text: str) -> AcceptedTraining:
    return AcceptedTraining(parsed(text, "test"), ModelPlace("/model", is_named=True), {}, {})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", [1.234, 1.234, 1.234]),
        ("curves = false", [None, None, None]),
        ('metrics = ["eval_loss"]', [None, 1.234, None]),
        ('metrics = ["train_loss"]\nmetric_digits = 2', [1.2, None, 1.2]),
    ],
)
def test_curves_are_told_as_metrics_are(text: str, told: list[float | None]):
    accepted = gate(f"[leaves]\n{text}")
    assert [
        accepted.told_curve(tag, 1.234) for tag in ("train/loss", "eval/loss", "round/train_loss")
    ] == told


def test_metrics_that_are_not_listed_stay():
    accepted = gate('[leaves]\nmetrics = ["eval_loss"]')
    assert accepted.told_metrics({"eval_loss": 1.5, "train_loss": 2.5}) == {"eval_loss": 1.5}


def test_a_task_without_a_limit_is_asked_for_an_abort_alone():
    assert gate("").limited(lambda: True)() is True
    assert gate("").limited(lambda: False)() is False


def test_a_task_beyond_its_seconds_is_refused(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("nvflare_llm_components.policy.job.time.monotonic", lambda: now[0])
    is_over = gate("[training]\ntask_seconds = 5").limited(lambda: False)
    now[0] = 104.0
    assert is_over() is False
    now[0] = 106.0
    with pytest.raises(PolicyError, match="task: this site's policy expects at most 5 s"):
        is_over()


@pytest.mark.parametrize("numbers", [(3, 0, 1), (0, 2, 1), (1, 0, 11)])
def test_rounds_and_steps_have_ceilings(numbers: tuple[int, int, int]):
    accepted = gate("[training]\nrounds = 2\nsteps = 10")
    accepted.check_round(2, 1, 10)
    with pytest.raises(PolicyError, match="this site's policy expects at most"):
        accepted.check_round(*numbers)
