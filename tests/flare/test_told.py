from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from nvflare_llm_components.flare.told import told, traceback_of, without_values
from nvflare_llm_components.policy.site import POLICY_FILE
from nvflare_llm_components.tensors.errors import ReportableError
from tests.flare.test_site import context, kit

__all__ = ["kit"]


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_a_library_s_error_is_told_by_its_type_alone(kit: Path):
    assert "secret" not in told(context(kit), raised(KeyError("secret")))
    assert told(context(kit), raised(ReportableError("a: b"))) == "ReportableError: a: b"


def test_a_policy_that_cannot_be_read_tells_nothing(kit: Path):
    (kit / "local" / POLICY_FILE).write_text("nonsense")
    assert "a: b" not in told(context(kit), raised(ReportableError("a: b")))


def test_no_line_of_the_log_can_be_forged():
    cause = raised(KeyError("a\nERROR forged"))
    error = ValueError("b\nERROR forged")
    error.__cause__ = cause
    assert not [line for line in traceback_of(raised(error)).splitlines() if line.startswith("ERROR")]


@given(
    secret=st.text(alphabet=st.characters(exclude_categories=["Cs", "Ll", "Lu"]), min_size=6, max_size=100),
    cut=st.integers(12, 100),
)
@example(secret="\\00000", cut=12)
def test_no_variable_of_a_site_is_told(secret: str, cut: int):
    """Written as it is or as Python writes it, and cut anywhere."""
    for written in (secret, repr(secret)[1:-1]):
        found = without_values(f"expected a, found {written[:cut]}", {"SECRET": secret})
        assert found.startswith("expected a, found {$SECRET}")
        assert len(found) < len("expected a, found {$SECRET}") + 12  # of an escape that was cut


def test_a_variable_may_hold_its_own_name():
    assert without_values("SECRET_KEY, SECRET", {"SECRET": "SECRET_KEY"}) == "{$SECRET}, {$SECRET}"


def test_a_variable_may_repeat_itself():
    assert without_values("found abcdefabcdefXYZ.", {"A": "abcdefabcdefXYZ"}) == "found {$A}."
