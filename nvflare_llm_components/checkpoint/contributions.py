"""Which site sent values that must not be saved: an average no longer tells."""

from collections.abc import Mapping
from typing import Any

import torch

from nvflare_llm_components.checkpoint.soundness import count_nonfinite


class NonFiniteResults:
    """The tensors with NaN or Inf in each site's result, until the model of their round is saved."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int | None], list[str]] = {}

    def note(self, site: str, round_number: int | None, values: Mapping[str, Any]) -> None:
        """Look at a site's result.

        Args:
            site: its name.
            round_number: the round that the result is of, None if that is not known.
            values: tensors or arrays by name, or values that know without being decoded: `has_nonfinite`.
        """
        found = [name for name, value in values.items() if _has_nonfinite(value)]
        if found:
            self._found[site, round_number] = found

    def sentence(self, round_number: int) -> str:
        """Say which sites sent what to a round's model; empty if all they sent was finite."""
        return " ".join(
            f"Site '{site}' sent NaN or Inf in {names[0]}"
            f"{f' (+{len(names) - 1} more)' if len(names) > 1 else ''}."
            for (site, sent_in), names in sorted(self._found.items(), key=lambda item: item[0][0])
            if sent_in in (round_number, None)
        )

    def forget(self) -> None:
        """Forget what was noted."""
        self._found.clear()


def _has_nonfinite(value: Any) -> bool:
    if hasattr(value, "has_nonfinite"):
        return bool(value.has_nonfinite)
    try:
        return count_nonfinite(torch.as_tensor(value)) > 0
    except (TypeError, ValueError, RuntimeError):
        return False  # no tensor, or one that FLARE left in a file: the check of the average sees it
