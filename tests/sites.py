"""A site as a filter sees one: real FLContexts, a workspace on disk, an engine that delivers events."""

from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ProcessType
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.utils.fl_context_utils import gen_new_peer_ctx
from nvflare.apis.workspace import Workspace
from nvflare.private.event import fire_event

JOB_ID = "job-1"


class Site:
    """One process of a job. A restart is a new Site on the same folder.

    Attributes:
        run_dir: the job's run directory.
        events: types of all events fired here.
        panic: reason of a FATAL_SYSTEM_ERROR, if there was one.
    """

    def __init__(self, folder: Path, name: str, *components: FLComponent, job_id: str = JOB_ID) -> None:
        for part in ("startup", "local"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self._workspace = Workspace(str(folder), name)
        self.run_dir = Path(self._workspace.get_run_dir(job_id))
        self.run_dir.mkdir(exist_ok=True)
        self._components = list(components)
        self.events: list[str] = []
        self.panic: str | None = None
        kind = ProcessType.SERVER_JOB if name == "server" else ProcessType.CLIENT_JOB
        self._manager = FLContextManager(self, name, job_id, {}, {FLContextKey.PROCESS_TYPE: kind})
        self.fire_event(EventType.START_RUN, self.new_context())

    def get_workspace(self) -> Workspace:
        return self._workspace

    def new_context(self) -> FLContext:
        return self._manager.new_context()

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        self.events.append(event_type)
        if event_type == EventType.FATAL_SYSTEM_ERROR:
            self.panic = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
        fire_event(event=event_type, handlers=self._components, ctx=fl_ctx)

    def context(self, task: str = "train", peer: "Site | None" = None) -> FLContext:
        """A context of one task; the peer's public properties are those of this moment."""
        fl_ctx = self.new_context()
        fl_ctx.set_prop(FLContextKey.TASK_NAME, task, private=True, sticky=False)
        if peer:
            fl_ctx.set_peer_context(gen_new_peer_ctx(peer.new_context()))
        return fl_ctx
