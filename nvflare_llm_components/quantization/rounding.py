"""Weights in no more digits than a site lets out, in the dtype that they had."""

from typing import Any

import torch

from nvflare_llm_components.quantization.codec import Codec, decode
from nvflare_llm_components.quantization.precision import CODECS
from nvflare_llm_components.tensors.convert import tensor_of

_ENCODED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rounded(values: dict[str, Any], precision: str) -> dict[str, Any]:
    """Values as they would be had they travelled at a precision: norms and biases, too.

    What is beyond a format's range is its largest value; NaN and infinities stay what they are.

    Args:
        values: tensors or lazy values by name, on any device; integers stay as they are.
        precision: ``fp32`` (no change), or the name of a codec.
    """
    codec = CODECS.get(precision)
    if codec is None:
        return values
    return {
        name: _rounded(tensor_of(value), codec) if value.is_floating_point() else value
        for name, value in values.items()
    }


def _rounded(value: torch.Tensor, codec: Codec) -> torch.Tensor:
    weights = value if value.dtype in _ENCODED else value.float()
    encoded, block_size = codec.encode(weights, codec.default_block_size), codec.default_block_size
    decoded = decode(codec, encoded.payload, value.numel(), block_size, encoded.num_nonfinite)
    return decoded.view(value.shape).to(value.dtype)
