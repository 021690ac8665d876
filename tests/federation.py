"""A server's job process: FLARE's own runner, communicator, controllers and filters; sites by hand."""

import gc
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ProcessType
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.impl.controller import Controller
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.server_engine_spec import ServerEngineSpec
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.fl_context_utils import gen_new_peer_ctx
from nvflare.apis.workspace import Workspace
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.private.event import fire_event
from nvflare.private.fed.server.server_json_config import WorkFlow
from nvflare.private.fed.server.server_runner import ServerRunner, ServerRunnerConfig

from tests.sites import JOB_ID, Site


class Federation(ServerEngineSpec):
    """One job on the server, with sites that are asked for nothing: a test answers for them.

    Attributes:
        run_dir: the job's run directory on the server.
        panic: reason of the first FATAL_SYSTEM_ERROR, if there was one.
        workflow: the job's controller.
    """

    def __init__(
        self,
        folder: Path,
        workflow: Controller,
        components: Mapping[str, FLComponent],
        *,
        sites: Sequence[str] = ("a", "b", "c"),
        result_filters: Sequence[Filter] = (),
        client_config: str | None = None,
    ) -> None:
        for part in ("startup", "local"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self._workspace = Workspace(str(folder), "server")
        self.run_dir = Path(self._workspace.get_run_dir(JOB_ID))
        config = Path(self._workspace.get_app_config_dir(JOB_ID))
        config.mkdir(parents=True, exist_ok=True)
        if client_config is not None:
            (config / "config_fed_client.json").write_text(client_config)
        self.workflow, self.panic = workflow, None
        self.clients = {name: Client(name, f"token-{name}") for name in sites}
        for client in self.clients.values():
            client.set_fqcn(FQCN.join([FQCN.ROOT_SERVER, client.name]))
        self._peers = {name: Site(folder / "peers" / name, name) for name in sites}
        self._tasks: dict[str, tuple[str, str, Shareable]] = {}
        self.components = dict(components)
        self.communicator = WFCommServer(task_check_period=0.005)
        self.communicator.controller = workflow
        workflow.set_communicator(self.communicator)
        parts = [workflow, getattr(workflow, "aggregator", None), self.communicator]
        handlers = [*self.components.values(), *(part for part in parts if part), *result_filters]
        kind = {
            FLContextKey.PROCESS_TYPE: ProcessType.SERVER_JOB,
            FLContextKey.WORKSPACE_OBJECT: self._workspace,
        }
        self._manager = FLContextManager(self, "server", JOB_ID, {}, kind)
        settings = ServerRunnerConfig(
            heartbeat_timeout=600,
            task_request_interval=0.01,
            workflows=[WorkFlow("workflow", workflow)],
            task_data_filters={},
            task_result_filters={"train/in": list(result_filters)},
            handlers=handlers,
            components=self.components,
        )
        self.runner = ServerRunner(settings, JOB_ID, self)
        self.handlers = [*handlers, self.runner]
        self._thread = threading.Thread(target=self.runner._execute_run, daemon=True)

    def start(self) -> "Federation":
        """Begin the job."""
        gc.freeze()  # each result is followed by a collection, which would walk all that was imported
        self.fire_event(EventType.START_RUN, self.new_context())
        self.runner.status = "started"
        self._thread.start()
        return self

    def ask(self, site: str) -> Shareable:
        """What a site gets when it asks for work; waits until there is some."""
        while True:
            with self.context(site) as fl_ctx:
                name, task_id, data = self.runner.process_task_request(self.clients[site], fl_ctx)
            if task_id:
                self._tasks[site] = name, task_id, data
                return data
            assert self._thread.is_alive(), f"the job is over: {self.panic}"
            time.sleep(0.002)

    def answer(self, site: str, reply: Shareable) -> None:
        """What FLARE's server does with a site's reply to its last task."""
        name, task_id, data = self._tasks[site]
        reply.set_cookie_jar(dict(data.get_cookie_jar() or {}))
        with self.context(site) as fl_ctx:
            fl_ctx.get_peer_context().set_prop(FLContextKey.SHAREABLE, reply, private=True, sticky=True)
            self.runner.process_submission(self.clients[site], name, task_id, reply, fl_ctx)

    def end(self) -> None:
        """Wait until the job is over."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.fire_event(EventType.END_RUN, self.new_context())

    def context(self, site: str) -> FLContext:
        fl_ctx = self.new_context()
        fl_ctx.set_peer_context(gen_new_peer_ctx(self._peers[site].new_context()))
        return fl_ctx

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.FATAL_SYSTEM_ERROR:
            self.panic = self.panic or fl_ctx.get_prop(FLContextKey.EVENT_DATA)
        fire_event(event=event_type, handlers=self.handlers, ctx=fl_ctx)

    def get_clients(self) -> list[Client]:
        return list(self.clients.values())

    def new_context(self) -> FLContext:
        return self._manager.new_context()

    def get_workspace(self) -> Workspace:
        return self._workspace

    def get_component(self, component_id: str) -> object:
        return self.components.get(component_id)

    def register_aux_message_handler(self, topic: str, message_handle_func: Any) -> None:
        """Nobody sends one here."""

    def persist_components(self, fl_ctx: FLContext, completed: bool) -> None:
        """Nothing is snapshot here."""

    def get_cell(self) -> None:
        """There is no line to the sites."""

    sync_clients_from_main_process = update_job_run_status = add_component = send_aux_request = None
    multicast_aux_requests = get_widget = restore_components = start_client_job = None
    check_client_resources = cancel_client_resources = get_client_name_from_token = validate_targets = None
