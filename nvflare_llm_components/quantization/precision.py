"""Which parameter travels at which precision."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import re2
import torch

from nvflare_llm_components.quantization.blocks import check_block_size
from nvflare_llm_components.quantization.cast import BF16, FP16
from nvflare_llm_components.quantization.codec import Codec
from nvflare_llm_components.quantization.int2 import Int2Codec
from nvflare_llm_components.quantization.int8 import Int8Codec
from nvflare_llm_components.quantization.nf4 import NF4Codec
from nvflare_llm_components.tensors.lazy import LazyValue
from nvflare_llm_components.tensors.text import printable

CODECS: dict[str, Codec] = {codec.name: codec for codec in (FP16, BF16, Int8Codec(), NF4Codec(), Int2Codec())}
PRECISIONS = ("fp32", *CODECS)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_QUIET = re2.Options()
_QUIET.log_errors = False
_MAX_PATTERN = 1000  # characters
_MAX_PATTERNS = 200
_SMALL_VECTOR = 1 << 16  # norms and biases: thousands of weights beside millions


@dataclass(frozen=True)
class PrecisionPolicy:
    """Chooses the codec of each parameter.

    Attributes:
        precision: one of PRECISIONS; ``fp32`` leaves a value as it is.
        block_size: weights that share a scale in the blockwise codecs; None is each codec's default.
        overrides: {regular expression: precision}; the first that is found in a parameter's name decides.
            Patterns are RE2's: no look-around, no back-references.

    Raises:
        ValueError: for an unknown precision, a bad block size or a pattern that does not compile.
    """

    precision: str
    block_size: int | None = None
    overrides: Mapping[str, str] | None = None
    _patterns: tuple[tuple[Any, str], ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        _check_precision("precision", self.precision)
        if self.block_size is not None:
            check_block_size(self.block_size)
        if len(self.overrides or {}) > _MAX_PATTERNS:
            raise ValueError(
                f"overrides should be at most {_MAX_PATTERNS} patterns: each is looked for in each name. "
                f"Found {len(self.overrides or {})}."
            )
        patterns = tuple(_compiled(pattern, name) for pattern, name in (self.overrides or {}).items())
        object.__setattr__(self, "_patterns", patterns)

    @property
    def has_differences(self) -> bool:
        """Whether any parameter may be given to a codec that is for differences."""
        named = (self.precision, *(self.overrides or {}).values())
        return any(CODECS[name].is_for_differences for name in named if name in CODECS)

    def for_whole_weights(self) -> "PrecisionPolicy":
        """This policy with ``int8`` in the place of codecs that are for differences."""
        overrides = {pattern: _of_whole(name) for pattern, name in (self.overrides or {}).items()}
        return PrecisionPolicy(_of_whole(self.precision), self.block_size, overrides)

    def codec_of(self, name: str, weights: torch.Tensor | LazyValue) -> Codec | None:
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


def _of_whole(precision: str) -> str:
    return "int8" if precision in CODECS and CODECS[precision].is_for_differences else precision


def _check_precision(where: str, precision: object) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"{where} should be one of {', '.join(PRECISIONS)}. Found {precision!r}.")


def _compiled(pattern: str, precision: str) -> tuple[Any, str]:
    """A pattern of a job, matched in time linear in a name's length, whatever it is."""
    _check_precision(f"overrides[{printable(pattern)!r}]", precision)
    try:
        if len(pattern) > _MAX_PATTERN:
            raise re2.error(f"more than {_MAX_PATTERN} characters")
        return re2.compile(pattern, _QUIET), precision
    except re2.error as e:
        raise ValueError(
            f"overrides: {printable(pattern)!r} should be a regular expression without look-around and "
            f"back-references. Found: {printable(e)}."
        ) from e
