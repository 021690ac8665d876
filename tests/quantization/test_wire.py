"""The wire format's pinned bytes: a release that changes them cannot read the messages of another."""

import math

import pytest
import torch

from nvflare_llm_components.quantization.message import Message, encode_message
from nvflare_llm_components.quantization.precision import PrecisionPolicy

GOLDEN_WEIGHTS = [0.0, 1.0, -1.0, 0.5, -0.25, 0.1, math.inf, 1e-3, 3.0]
GOLDEN = {
    "fp16": ("0000003c00bc003800b4662e007c19140042", 0),
    "bf16": ("0000803f80bf003f80becd3d807f833a4040", 0),
    "int8": ("06000000000000000000807fc23c002ad615f50400007f", 1),
    "int2": ("06000000000000000000807f6a77bf37ff8ea9ab", 1),
    "nf4": ("06000000000000000000807f3eff3f38ffb79476777f", 1),
}


def encoded(precision: str, weights: torch.Tensor, **policy) -> Message:
    return encode_message({"w": weights}, PrecisionPolicy(precision, **policy))


@pytest.mark.parametrize("precision", GOLDEN)
def test_golden_bytes(precision):
    message = encoded(precision, torch.tensor([GOLDEN_WEIGHTS]))
    payload, num_nonfinite = GOLDEN[precision]
    assert message.values["w"].numpy().tobytes().hex() == payload
    assert message.header["params"]["w"]["num_nonfinite"] == num_nonfinite
