import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_llm_components.checkpoint.validate import Inspection, validate
from nvflare_llm_components.tensors.errors import CheckpointError

SHAPES = {"a": (2, 3), "b": (4,), "n": (1,)}


def sound() -> dict[str, torch.Tensor]:
    return {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor([1])}


def test_a_sound_state_dict_passes():
    validate(sound(), SHAPES, "It")


def test_an_empty_one_is_refused():
    with pytest.raises(CheckpointError, match="It is empty: expected 3 tensors"):
        validate({}, SHAPES, "It")


def test_missing_unknown_and_reshaped_tensors_are_named():
    broken = {"a": torch.ones(3, 2), "n": torch.tensor([1]), "c": torch.ones(1)}
    with pytest.raises(
        CheckpointError,
        match=r"1 missing \(b\), 1 unknown \(c\), 1 of another shape \(a \(3, 2\) instead of \(2, 3\)\)",
    ):
        validate(broken, SHAPES, "It")


def inspected(new: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> float | None:
    inspection = Inspection(old, "It")
    for name, value in new.items():
        for start in range(0, value.numel(), 3):
            inspection.see(name, start, value.reshape(-1)[start : start + 3])
    return inspection.update_norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_counted_and_named(bad: float):
    broken = sound()
    broken["b"][1] = bad
    with pytest.raises(CheckpointError, match=r"NaN or Inf in 1 of 3 tensors \(b: 1 of 4 values\)"):
        inspected(broken, sound())


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_the_norm_is_that_of_the_whole_step(values: list[float]):
    step = torch.tensor(values)
    old = {"a": torch.ones(len(values)), "b": torch.zeros(len(values)), "count": torch.tensor(3)}
    new = {"a": old["a"] + step, "b": step, "count": torch.tensor(4), "frozen": torch.ones(9)}
    expected = torch.cat([(new["a"] - old["a"]).double(), step.double()]).norm().item()
    assert inspected(new, old) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_model_before_it_that_was_not_finite_has_no_distance_and_no_fault():
    assert inspected({"a": torch.zeros(1)}, {"a": torch.tensor([torch.inf])}) is None
