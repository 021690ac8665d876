import pytest
import torch

from nvflare_llm_components.checkpoint.validate import validate
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_counted_and_named(bad: float):
    broken = sound()
    broken["b"][1] = bad
    with pytest.raises(CheckpointError, match=r"NaN or Inf in 1 of 3 tensors \(b: 1 of 4 values\)"):
        validate(broken, SHAPES, "It")
