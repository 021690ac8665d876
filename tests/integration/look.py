"""A component of a site that writes down what its results are made of, before any filter has seen them."""

from pathlib import Path

from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext


class Look(FLComponent):
    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.BEFORE_TASK_RESULT_FILTER:
            data = from_shareable(fl_ctx.get_prop(FLContextKey.TASK_RESULT)).data
            kinds = sorted({type(value).__name__ for value in data.values()})
            run_dir = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
            with (run_dir / "seen.txt").open("a") as file:
                file.write(f"{fl_ctx.get_prop(FLContextKey.TASK_NAME)}: {', '.join(kinds)}\n")
