"""Which parameter travels at which precision."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nvflare_llm_components.quantization.blocks import check_block_size
from nvflare_llm_components.quantization.cast import BF16, FP16
from nvflare_llm_components.quantization.codec import Codec
from nvflare_llm_components.quantization.int8 import Int8Codec
from nvflare_llm_components.quantization.nf4 import NF4Codec

CODECS: dict[str, Codec] = {codec.name: codec for codec in (FP16, BF16, Int8Codec(), NF4Codec())}
PRECISIONS = ("fp32", *CODECS)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SMALL_VECTOR = 1 << 16  # norms and biases: thousands of weights beside millions


@dataclass(frozen=True)
class PrecisionPolicy:
    """Chooses the codec of each parameter.

    Attributes:
        precision: one of PRECISIONS; ``fp32`` leaves a value as it is.
        block_size: weights that share a scale in ``int8`` and ``nf4``; None is each codec's default.
        overrides: {regular expression: precision}; the first that is found in a parameter's name decides.

    Raises:
        ValueError: for an unknown precision, a bad block size or a pattern that does not compile.
    """

    precision: str
    block_size: int | None = None
    overrides: Mapping[str, str] | None = None
    _patterns: tuple[tuple[re.Pattern[str], str], ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        _check_precision("precision", self.precision)
        if self.block_size is not None:
            check_block_size(self.block_size)
        patterns = tuple(_compiled(pattern, name) for pattern, name in (self.overrides or {}).items())
        object.__setattr__(self, "_patterns", patterns)

    def codec_of(self, name: str, weights: torch.Tensor) -> Codec | None:
        """The codec for a parameter, or None where it travels as it is.

        As it is: what is no 16 to 64 bit float, what is not wider than the codec's codes, and for the
        blockwise codecs small vectors (norms, biases), whose precision costs no bytes worth saving. An
        override outranks the last.
        """
        overridden = next((p for pattern, p in self._patterns if pattern.search(name)), None)
        codec = CODECS.get(overridden or self.precision)
        if codec is None or weights.dtype not in _FLOATS or weights.element_size() * 8 <= codec.bits:
            return None
        is_small = weights.dim() <= 1 and weights.numel() <= _SMALL_VECTOR
        if overridden is None and codec.default_block_size and is_small:
            return None
        return codec


def _check_precision(where: str, precision: object) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"{where} should be one of {', '.join(PRECISIONS)}. Found {precision!r}.")


def _compiled(pattern: str, precision: str) -> tuple[re.Pattern[str], str]:
    _check_precision(f"overrides[{pattern!r}]", precision)
    try:
        return re.compile(pattern), precision
    except re.error as e:
        raise ValueError(f"overrides: {pattern!r} should be a regular expression. Found: {e}.") from e
