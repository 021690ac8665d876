"""A change that is made as it is read."""

import numpy as np
import pytest
import torch

from nvflare_llm_components.quantization.message import decode_message, encode_message
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.tensors.difference import Difference
from nvflare_llm_components.tensors.lazy import BLOCK_LENGTH, Deferred

SHAPES = [(), (0, 3), (3, 5), (BLOCK_LENGTH // 10, 47)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_it_is_the_difference_to_what_a_message_decodes_to(precision: str, shape: tuple[int, ...]):
    new, old = torch.randn(shape), {"w": torch.randn(shape)}
    message = encode_message(old, PrecisionPolicy(precision))
    whole, lazy = (
        decode_message(message.values, message.header, None, is_lazy)[0] for is_lazy in (False, True)
    )
    change = Difference(new, lazy["w"])
    assert (change.shape, change.dtype) == (new.shape, torch.float32)
    assert torch.equal(change.materialize(), new - whole["w"])
    assert torch.equal(torch.cat([*change.blocks()]), (new - whole["w"]).reshape(-1))
    assert torch.equal(lazy["w"].materialize(), whole["w"])  # what came in is as it was


@pytest.mark.parametrize(
    "convert", [lambda v: v, np.asarray, lambda v: v.double(), lambda v: v.T.contiguous().T]
)
def test_what_came_in_may_be_of_any_kind(convert):
    new, old = torch.randn(30, 20).bfloat16(), torch.randn(30, 20)
    assert torch.equal(Difference(new, convert(old)).materialize(), new.float() - old.bfloat16().float())


def test_nothing_is_read_before_it_is_asked_for():
    read: list[int] = []

    def blocks():
        read.append(1)
        yield torch.zeros(6)

    change = Difference(torch.ones(2, 3), Deferred(blocks, (2, 3), torch.float32))
    assert (change.numel(), change.dim(), change.is_floating_point(), read) == (6, 2, True, [])
    assert torch.equal(change + 1, torch.full((2, 3), 2.0))
