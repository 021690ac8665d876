"""A result whose tensors can't be pulled, through FLARE's own encoding."""

import json
from typing import Any

import pytest
import torch
from nvflare.fuel.f3.cellnet.core_cell import make_reply
from nvflare.fuel.f3.cellnet.defs import ReturnCode
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import dots
from nvflare.fuel.utils.fobs.datum import Datum, DatumManager
from nvflare.fuel.utils.fobs.decomposers.via_downloader import EncKey, EncType, _RefKey

from nvflare_llm_components.filters import PrecisionDequantizeFilter
from nvflare_llm_components.flare.arrival import register_tensors


class DeadEnd:
    """FLARE's cell of a process that reaches nobody."""

    def __init__(self, fqcn: str) -> None:
        self._fqcn = fqcn

    def get_fqcn(self) -> str:
        return self._fqcn

    def get_fobs_context(self) -> dict[str, Any]:
        return {}

    def register_request_cb(self, **_: Any) -> None:
        pass

    def send_request(self, **_: Any) -> Any:
        return make_reply(ReturnCode.TARGET_UNREACHABLE)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decomposers are a process's own: this test's are gone with it, and those of others are back."""
    for registry in ("_decomposers", "_dot_handlers"):
        monkeypatch.setattr(f"nvflare.fuel.utils.fobs.fobs.{registry}", {})


def pulled(fqcn: str) -> torch.Tensor:
    """What becomes of a site's tensor on its way to a process."""
    handler = fobs.get_dot_handler(dots.TENSOR_DOWNLOAD)
    context = {fobs.FOBSContextKey.CELL: DeadEnd(fqcn)}
    manager = DatumManager(fobs_ctx=context)
    reference = json.dumps({_RefKey.FQCN: "site-1.job", _RefKey.REF_ID: "r"})
    handler.process_datum(Datum.text_datum(reference, handler.get_download_dot()), manager)
    found: torch.Tensor = handler.recompose({EncKey.TYPE: EncType.REF, EncKey.DATA: "T0"}, manager)
    return found


@pytest.mark.parametrize("register", [register_tensors, PrecisionDequantizeFilter])
def test_on_the_server_it_is_empty_and_no_failure(register: Any, caplog: pytest.LogCaptureFixture):
    register()
    assert pulled("server.job").numel() == 0
    assert "A result of 'site-1' did not arrive whole and does not count" in caplog.text


@pytest.mark.parametrize("fqcn", ["site-2.job", "server"])
def test_elsewhere_it_fails_as_ever(fqcn: str):
    register_tensors()
    with pytest.raises(RuntimeError, match="failed to download"):
        pulled(fqcn)
