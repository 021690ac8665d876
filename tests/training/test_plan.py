"""Rounds of a site that misses some: its last step is at the schedule's end, and its own steps add up."""

from hypothesis import given
from hypothesis import strategies as st

from nvflare_llm_components.training.budget import Budget
from nvflare_llm_components.training.plan import Plan
from nvflare_llm_components.training.rounds import RoundCount

BUDGETS = st.builds(
    Budget,
    local_steps=st.none() | st.integers(1, 20),
    local_epochs=st.floats(0.05, 4),
    steps_per_epoch=st.integers(1, 50),
)


@given(BUDGETS, st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_the_schedule_is_where_the_federation_is(budget, rounds):
    num_rounds, present = rounds
    count = RoundCount()
    plan, step, position = Plan(budget, count, follows_site=False), 0, 0
    for number in sorted(present | {num_rounds - 1}):
        count.begin(number, 0)
        if count.done == 0:
            plan.begin(num_rounds, 0)
        order = plan.order(number, step, 0.0)
        position += order.ahead
        assert position == budget.boundary(number)
        position += order.boundary - step
        step = order.boundary
        assert (position, plan.lead) == (budget.boundary(number + 1), position - step)
        count.end(number)
    assert position == plan.horizon == budget.boundary(num_rounds)


@given(BUDGETS, st.integers(1, 12))
def test_with_all_rounds_nothing_is_moved(budget, num_rounds):
    count = RoundCount()
    plan = Plan(budget, count, follows_site=False)
    step = 0
    for number in range(num_rounds):
        count.begin(number, None)
        if number == 0:
            plan.begin(num_rounds, None)
        order = plan.order(number, step, 0.0)
        assert (order.ahead, order.horizon) == (0, budget.boundary(num_rounds))
        step = order.boundary
        count.end(number)


def test_a_job_that_continues_another_spans_both():
    count = RoundCount(first=0, last=2, done=3)
    plan = Plan(Budget(local_steps=4, local_epochs=1, steps_per_epoch=1), count, follows_site=False)
    plan.begin(num_rounds=2, first_round=3)
    assert plan.horizon == 20
