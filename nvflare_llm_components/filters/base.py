"""What both filters share: which messages they see, and the accounting."""

from typing import Any

import torch
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.dxo import DataKind
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs.datum import DatumManager

from nvflare_llm_components.flare.arrival import register_tensors
from nvflare_llm_components.flare.headers import is_server
from nvflare_llm_components.flare.messages import run_dir_of, with_own_collection
from nvflare_llm_components.quantization.lazy import LazyTensor
from nvflare_llm_components.quantization.ledger import (
    append_record,
    record_of,
    sentence_of,
    total_wire_bytes,
)
from nvflare_llm_components.quantization.shadow import ShadowTensor
from nvflare_llm_components.quantization.traffic import Traffic
from nvflare_llm_components.tensors.lazy import LazyValue
from nvflare_llm_components.tensors.text import printable


class LazyValueDecomposer(fobs.Decomposer):
    """Sends a lazy value as the tensor that it stands for.

    Args:
        kind: class of the lazy value.
    """

    def __init__(self, kind: type[LazyValue]) -> None:
        self._kind = kind

    def supported_type(self) -> type[LazyValue]:
        """See FLARE's Decomposer."""
        return self._kind

    def decompose(self, target: LazyValue, manager: DatumManager | None = None) -> torch.Tensor:
        """See FLARE's Decomposer."""
        return target.materialize().contiguous()

    def recompose(self, data: torch.Tensor, manager: DatumManager | None = None) -> torch.Tensor:
        """See FLARE's Decomposer."""
        return data


class PrecisionFilter(DXOFilter):
    """What both filters share: which messages they see, and the accounting."""

    def __init__(self) -> None:
        kinds = [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]
        super().__init__(supported_data_kinds=kinds, data_kinds_to_filter=kinds)
        register_tensors()
        for kind in (LazyTensor, ShadowTensor):  # where a result is sent on as it came
            fobs.register(LazyValueDecomposer(kind))

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Filter a message. The containers of a COLLECTION are copied first: a broadcast shares them."""
        return super().process(with_own_collection(shareable), fl_ctx)

    def account(self, traffic: Traffic, context: dict[str, Any], fl_ctx: FLContext, cached: bool) -> None:
        """Log one line; where there is a run directory, append to its ledger and stream the total."""
        record = record_of(traffic, context, cached)
        self.log_info(fl_ctx, sentence_of(record))
        run_dir = run_dir_of(fl_ctx)
        if run_dir is None:
            return
        try:
            append_record(run_dir, record)
            total = total_wire_bytes(run_dir, record["direction"])
        except (
            OSError,
            TypeError,
            ValueError,
        ) as e:  # raised on the server, it would cost all sites their round
            self.log_warning(fl_ctx, f"The ledger lacks this message, whose sizes are above: {printable(e)}")
            return
        if not is_server(fl_ctx):
            tag, scalar = f"wire_bytes/{record['direction']}", AnalyticsDataType.SCALAR
            dxo = create_analytic_dxo(tag, float(total), scalar, global_step=record["round"] or 0)
            with fl_ctx.get_engine().new_context() as event_ctx:
                send_analytic_dxo(self, dxo, event_ctx)
