"""What a codec is, and what is asked of it; which there are: ``CODECS`` in :mod:`.precision`."""

from dataclasses import dataclass
from typing import Protocol

import torch

from nvflare_llm_components.quantization.chunks import FlatValues, each_share


@dataclass(frozen=True)
class Encoded:
    """A tensor as bytes.

    Attributes:
        payload: contiguous 1-D uint8 tensor on the device of the source.
        num_nonfinite: NaN and infinite weights that a blockwise codec stored beside the codes.
        num_saturated: finite weights beyond the range of the format, stored as its largest value.
    """

    payload: torch.Tensor
    num_nonfinite: int = 0
    num_saturated: int = 0


class Codec(Protocol):
    """Turns floating-point weights into bytes and back. Stateless; equal input gives equal bytes."""

    @property
    def name(self) -> str:
        """Name of the codec on the wire."""

    @property
    def bits(self) -> int:
        """Bits of one code; a source that is not wider than this is sent as it is."""

    @property
    def is_for_differences(self) -> bool:
        """Whether it is too coarse for whole weights, and made for what training changed in them."""

    @property
    def default_block_size(self) -> int | None:
        """Weights that share a scale, or None where there are no blocks."""

    def num_payload_bytes(self, num_weights: int, block_size: int | None, num_nonfinite: int) -> int:
        """Exact size of the payload of `num_weights` weights."""

    def encode(self, weights: torch.Tensor | FlatValues, block_size: int | None) -> Encoded:
        """Encode floating-point weights: a tensor of any shape and device, or what is made as it is read."""

    def check(
        self, payload: torch.Tensor, num_weights: int, block_size: int | None, num_nonfinite: int
    ) -> None:
        """Raise ValueError for a payload of the right size that :meth:`encode` could not have written.

        What passes decodes to finite weights, but for those that are stored as what they are.
        """

    def decode_into(
        self,
        out: torch.Tensor,
        payload: torch.Tensor,
        num_weights: int,
        block_size: int | None,
        num_nonfinite: int,
        start: int = 0,
    ) -> None:
        """Decode the weights from `start` on of a payload of the right size.

        Args:
            out: flat float32 tensor on the payload's device, as long as what is decoded.
            payload: of all weights.
            num_weights: of the payload.
            block_size: of the payload.
            num_nonfinite: of the payload.
            start: a multiple of :data:`~nvflare_llm_components.tensors.lazy.BLOCK_LENGTH`.
        """


def decode(
    codec: Codec, payload: torch.Tensor, num_weights: int, block_size: int | None, num_nonfinite: int
) -> torch.Tensor:
    """Decode a payload of the right size into a flat float32 tensor on its device."""
    weights = torch.empty(num_weights, dtype=torch.float32, device=payload.device)

    def decode_share(share: slice) -> None:
        codec.decode_into(weights[share], payload, num_weights, block_size, num_nonfinite, share.start)

    each_share(decode_share, num_weights, payload.device)
    return weights
