import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvflare_llm_components.flare import quorum
from nvflare_llm_components.flare.quorum import Quorum


def test_the_others_are_given_their_time_once_there_are_enough(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(quorum.time, "monotonic", lambda: now[0])
    round_ = Quorum(["a", "b", "c"], least=2, grace_s=5)
    assert not round_.is_over(1)
    now[0] = 200.0
    assert not round_.is_over(2), "the time begins with the second result"
    now[0] = 204.9
    assert not round_.is_over(2)
    now[0] = 205.0
    assert round_.is_over(2)


@given(num_sites=st.integers(1, 9), least=st.integers(1, 9), num_failed=st.integers(0, 9))
def test_it_is_out_of_reach_when_too_few_are_left(num_sites: int, least: int, num_failed: int):
    sites = [f"site-{number}" for number in range(num_sites)]
    failed = dict.fromkeys(sites[:num_failed], "why")
    assert Quorum(sites, least, 0, failed).is_out_of_reach == (num_sites - len(failed) < least)
