"""What the jobs of round_trip.py carry: an executor that does not train, and the stock persistor's model."""

import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import make_reply
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

CHANGE = 1e-3


class AddingExecutor(Executor):
    """Answers `train` with the incoming weights plus a small change: a round without its training.

    Like a trainer it holds its model from round to round, and writes what comes in into it.

    Args:
        is_ours: whether tensors travel the package's way or FLARE's.
        sends_change: whether it sends the change alone.
    """

    def __init__(self, is_ours: bool, sends_change: bool = False):
        super().__init__()
        if is_ours:
            from nvflare_llm_components.flare.arrival import register_tensors

            register_tensors()
        else:
            fobs.register(TensorDecomposer)
        self.sends_change = sends_change
        self.model: dict[str, torch.Tensor] = {}

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        """Take the values out of the message one by one, so that each is let go of when it is written."""
        incoming = from_shareable(shareable)
        shareable.pop("DXO")
        received = dict(incoming.data) if self.sends_change else {}
        while incoming.data:
            self._load(*incoming.data.popitem())
        for value in self.model.values():
            value.add_(CHANGE)
        kind, data = DataKind.WEIGHTS, dict(self.model)
        if self.sends_change:
            from nvflare_llm_components.tensors.difference import Difference

            kind = DataKind.WEIGHT_DIFF  # as HFSFTExecutor does where our filter is the first
            data = {name: Difference(value, received[name]) for name, value in self.model.items()}
        dxo = DXO(kind, data=data, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: 1})
        return dxo.update_shareable(make_reply(ReturnCode.OK))

    def _load(self, name, value):
        if name not in self.model:
            self.model[name] = torch.empty(value.shape, dtype=value.dtype)
        flat, begin = self.model[name].view(-1), 0
        for block in value.blocks() if hasattr(value, "blocks") else [torch.as_tensor(value).reshape(-1)]:
            flat[begin : begin + block.numel()] = block
            begin += block.numel()


class StockModel(torch.nn.Module):
    """The wrapper of FLARE's own LLM example, which its persistor needs."""

    def __init__(self, folder: str):
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
