"""What transformers would fetch by itself, and run: kept out of a site, and of a server."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from nvflare_llm_components.tensors.errors import ReportableError

HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@contextmanager
def only_for(name_or_path: str) -> Iterator[None]:
    """Let the hub be asked in this block for a model that is a hub's, and for nothing beside a folder.

    Kernels of the hub are not used in this process from now on: where the package ``kernels`` is installed,
    transformers downloads and runs them unasked.
    """
    # Imported here: a server that builds no model keeps a hundred megabytes.
    from transformers.integrations import hub_kernels

    hub_kernels._kernels_enabled = False
    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or Path(name_or_path).is_absolute()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def check_attention(model_kwargs: dict[str, Any]) -> None:
    """Refuse an attention whose package is not installed: transformers takes one of the hub for it.

    Raises:
        ReportableError: naming the package.
    """
    chosen = model_kwargs.get("attn_implementation")
    package = _PACKAGES.get(str(chosen))
    if package and importlib.util.find_spec(package) is None:
        raise ReportableError(
            f"model_kwargs.attn_implementation: expected the package {package} for {chosen}, found it not "
            "installed at this site. Install it, or choose sdpa."
        )
