import json

from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.jobs.layout import WIDTH, layout

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
@settings(deadline=None)
def test_it_is_the_same_json(value):
    assert json.loads(layout(value)) == value


def test_what_fits_a_line_stands_on_one_and_what_does_not_is_broken():
    value = {"short": {"a": [1, 2]}, "long": ["x" * 40, "y" * 40, "z" * 40]}
    lines = layout(value).splitlines()
    assert '  "short": {"a": [1, 2]},' in lines
    assert f'    "{"x" * 40}",' in lines
    assert max(map(len, lines)) < WIDTH
