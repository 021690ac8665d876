import numpy as np
import pytest
import torch

from nvflare_llm_components.tensors.lazy import Deferred


def counted() -> tuple[Deferred, list[int]]:
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.ones(6)

    return Deferred(lambda: iter([make()]), (2, 3), torch.float32), made


def test_shape_and_dtype_are_known_before_it_is_made():
    value, made = counted()
    assert (value.shape, value.dtype) == ((2, 3), torch.float32)
    assert (value.numel(), value.dim(), value.element_size(), value.is_floating_point()) == (6, 2, 4, True)
    assert (value.nbytes, made) == (24, [])


def test_whoever_takes_it_for_a_tensor_gets_one():
    value, made = counted()
    assert torch.equal(torch.zeros(2, 3) + value, torch.ones(2, 3))
    assert np.asarray(value).sum() == 6
    assert value.sum().item() == 6
    assert len(made) == 3


def test_it_cannot_be_changed_in_place():
    with pytest.raises(AttributeError, match="add_"):
        counted()[0].add_(1)


def test_what_its_blocks_leave_out_is_not_made_up():
    with pytest.raises(ValueError, match="expected blocks of 6 values in all, found 4"):
        Deferred(lambda: iter([torch.ones(4)]), (2, 3), torch.float32).materialize()
