"""What error feedback asks of a code for differences: that no block loses more than it holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.quantization.codec import decode
from nvflare_llm_components.quantization.int2 import LEVELS, Int2Codec

CODEC = Int2Codec()


def decoded(weights: torch.Tensor, block_size: int = 64) -> torch.Tensor:
    payload = CODEC.encode(weights, block_size).payload
    CODEC.check(payload, weights.numel(), block_size, 0)
    return decode(CODEC, payload, weights.numel(), block_size, 0)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["spike", "few", "constant", "gaussian", "heavy", "ramp"]),
    block_size=st.sampled_from([16, 64, 1024]),
    seed=st.integers(0, 5),
)
def test_no_block_is_off_by_as_much_as_it_holds(kind, block_size, seed):
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(block_size, generator=generator)
    block = {
        "spike": torch.eye(1, block_size)[0],
        "few": gaussian * (torch.rand(block_size, generator=generator) < 0.1) + torch.eye(1, block_size)[0],
        "constant": torch.ones(block_size) * gaussian.sign(),
        "gaussian": gaussian,
        "heavy": gaussian**5,
        "ramp": torch.linspace(-1, 1, block_size),
    }[kind]
    assert float((decoded(block, block_size) - block).norm()) < 0.999 * float(block.norm())


def test_feedback_brings_everything_across_in_time():
    """Sums of what arrives come as close to sums of what was meant as one residual, also of spikes."""
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(4096, generator=generator) ** 3
    carried, arrived = torch.zeros(4096), torch.zeros(4096)
    for _ in range(100):
        step = decoded(update + carried)
        carried = update + carried - step
        arrived += step
    assert float(carried.norm()) < 5 * float(update.norm())
    assert float((arrived - 100 * update).norm() / (100 * update).norm()) < 0.05


def test_a_constant_block_and_a_partial_one_come_back_nearly_as_they_were():
    for size in (64, 70, 65, 1):
        weights = torch.full((size,), -0.25)
        torch.testing.assert_close(decoded(weights), weights, rtol=0.05, atol=0.0)


def test_the_levels_are_the_fixed_point_of_lloyds_algorithm_on_a_gaussian():
    x = torch.linspace(8 / 20_000, 8, 20_000, dtype=torch.float64) - 4 / 20_000  # midpoints: no half is empty
    density = torch.exp(-(x**2) / 2)
    border = 0.0
    for _ in range(200):
        inner, outer = (
            (float((x * density)[part].sum() / density[part].sum()) for part in (x <= border, x > border))
            if border
            else (0.5, 1.5)
        )
        border = (inner + outer) / 2
    assert LEVELS[2] == pytest.approx(inner / outer, abs=1e-4)
