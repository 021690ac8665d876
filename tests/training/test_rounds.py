"""A site's count of rounds keeps to the federation's, whatever the site misses."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_llm_components.training.rounds import RoundCount

NUMBERS = st.sets(st.integers(0, 50), min_size=1).map(sorted)


def train(rounds: RoundCount, number: int, first: int | None = None) -> int:
    missed = rounds.begin(number, first)
    assert rounds.passed == number - (rounds.first or 0)
    rounds.end(number)
    return missed


@given(NUMBERS, st.integers(0, 50))
def test_what_is_missed_and_what_is_done_make_up_the_federations_rounds(numbers, first):
    rounds = RoundCount()
    missed = [train(rounds, number, first) for number in numbers]
    assert min(missed) >= 0
    assert (rounds.done, sum(missed)) == (len(numbers), rounds.missed)
    assert rounds.passed == numbers[-1] + 1 - min(first, numbers[0])


@given(NUMBERS)
def test_where_the_first_round_is_not_told_it_is_the_first_one_seen(numbers):
    rounds = RoundCount()
    assert train(rounds, numbers[0]) == 0
    assert rounds.first == numbers[0]


def test_a_resumed_job_goes_on_with_the_count_of_the_first_one():
    rounds = RoundCount()
    train(rounds, 0, 0)
    assert train(rounds, 3, 2) == 2


def test_a_round_given_again_and_a_workflow_that_counts_anew_miss_nothing():
    rounds = RoundCount()
    for number in (0, 1, 1, 0, 1):
        missed = rounds.begin(number, 0)
        rounds.end(number)
        assert missed == 0
    assert rounds.passed == 5
    assert train(rounds, 4, 0) == 2


def test_a_round_that_failed_is_not_counted_twice():
    rounds = RoundCount()
    train(rounds, 0, 0)
    assert [rounds.begin(2), rounds.begin(2)] == [1, 0]


@given(NUMBERS, NUMBERS)
def test_what_is_kept_is_read_back(numbers, more):
    """Also after a second workflow that counts anew, where the first round is below zero."""
    rounds = RoundCount()
    assert RoundCount.read(asdict(rounds)) == rounds
    for number in [*numbers, *more]:
        train(rounds, number)
        assert RoundCount.read(asdict(rounds)) == rounds


@pytest.mark.parametrize("name", ["first", "last", "done", "missed"])
@pytest.mark.parametrize("value", [-(2**31), 2**31, 1.0, "1", True, [], {}])
def test_what_is_no_count_is_not_read(name, value):
    with pytest.raises(ValueError, match="expected"):
        RoundCount.read({name: value})


@pytest.mark.parametrize(
    "values", [{"done": -1}, {"missed": -1}, {"last": -1}, {"done": None}, {"more": 1}, 3, "done"]
)
def test_what_is_no_count_of_rounds_is_not_read(values):
    with pytest.raises((ValueError, TypeError)):
        RoundCount.read(values)
