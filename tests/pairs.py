"""A server's and a client's filter pair, and the messages between them, serialized by NVFlare's own FOBS."""

from pathlib import Path

import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.fuel.utils import fobs
from safetensors.torch import load_file

from nvflare_llm_components.filters import PrecisionDequantizeFilter, PrecisionQuantizeFilter
from nvflare_llm_components.quantization.message import META_KEY
from nvflare_llm_components.tensors.convert import tensor_of
from tests.sites import Site


def random(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(40, 90, generator=generator) * scale,
        "embed.weight": torch.randn(60, 40, generator=generator) * scale,
        "norm.weight": torch.ones(40),
    }


def message(data, current_round: int | None, kind: str = DataKind.WEIGHTS) -> Shareable:
    shareable = DXO(kind, data).to_shareable()
    shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, f"round {current_round}")
    if current_round is not None:
        shareable.set_header(AppConstants.CURRENT_ROUND, current_round)
    return shareable


class Client:
    """A client's filter pair; `restart` is a new process on the same disk."""

    def __init__(self, folder: Path, name: str = "site-1", **args) -> None:
        self.folder, self.name, self.args = folder / name, name, args
        self.restart()

    def restart(self) -> None:
        self.dequantize, self.quantize = PrecisionDequantizeFilter(), PrecisionQuantizeFilter(**self.args)
        self.site = Site(self.folder, self.name, self.dequantize, self.quantize)

    def receive(self, shareable: Shareable) -> dict[str, torch.Tensor]:
        self.fl_ctx = self.site.context()
        return from_shareable(self.dequantize.process(fobs.loads(fobs.dumps(shareable)), self.fl_ctx)).data

    def send(self, update, current_round: int, kind: str = DataKind.WEIGHT_DIFF) -> Shareable:
        shareable = message(update, current_round, kind)
        return fobs.loads(fobs.dumps(self.quantize.process(shareable, self.fl_ctx)))

    def shadow(self) -> dict[str, torch.Tensor]:
        return load_file(self.site.run_dir / "filter_state" / "shadow.safetensors")


class Server:
    """The server's filter pair."""

    def __init__(self, folder: Path, **args) -> None:
        self.folder, self.args = folder / "server", args
        self.restart()

    def restart(self) -> None:
        self.dequantize, self.quantize = PrecisionDequantizeFilter(), PrecisionQuantizeFilter(**self.args)
        self.site = Site(self.folder, "server", self.dequantize, self.quantize)

    def send(self, shareable: Shareable, client: Client) -> Shareable:
        return self.quantize.process(shareable, self.site.context(peer=client.site))

    def receive(
        self, shareable: Shareable, client: Client, is_accepted: bool = True
    ) -> dict[str, torch.Tensor]:
        """Decode a result, and tell of its end as FLARE's controllers do."""
        fl_ctx = self.site.context(peer=client.site)
        result = self.dequantize.process(shareable, fl_ctx)
        fl_ctx.set_prop(AppConstants.TRAINING_RESULT, result, private=True, sticky=False)
        fl_ctx.set_prop(AppConstants.AGGREGATION_ACCEPTED, is_accepted, private=True, sticky=False)
        self.site.fire_event(AppEventType.AFTER_CONTRIBUTION_ACCEPT, fl_ctx)
        return {name: tensor_of(value) for name, value in from_shareable(result).data.items()}

    shadow = Client.shadow


def codecs(shareable: Shareable) -> set[str]:
    return {entry["codec"] for entry in from_shareable(shareable).meta[META_KEY]["params"].values()}
