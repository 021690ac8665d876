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
    """Answers `train` with the incoming weights plus a small change: a round without its training."""

    def __init__(self, is_ours: bool, sends_change: bool = False):
        """Register what sends tensors, the package's or FLARE's; `sends_change` sends the change alone."""
        super().__init__()
        if is_ours:
            from nvflare_llm_components.flare.arrival import register_tensors

            register_tensors()
        else:
            fobs.register(TensorDecomposer)
        self.sends_change = sends_change

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        """Take the values out of the message one by one: each is this site's own, and changed in place."""
        incoming = from_shareable(shareable)
        shareable.pop("DXO")
        result = {}
        while incoming.data:
            name, value = incoming.data.popitem()
            value = value.materialize() if hasattr(value, "materialize") else torch.as_tensor(value)
            result[name] = value.fill_(CHANGE) if self.sends_change else value.add_(CHANGE)
        kind = DataKind.WEIGHT_DIFF if self.sends_change else DataKind.WEIGHTS
        dxo = DXO(kind, data=result, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: 1})
        return dxo.update_shareable(make_reply(ReturnCode.OK))


class StockModel(torch.nn.Module):
    """The wrapper of FLARE's own LLM example, which its persistor needs."""

    def __init__(self, folder: str):
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
