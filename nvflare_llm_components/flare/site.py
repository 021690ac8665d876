"""The site that runs this process: its policy, the places that a job may read, and its audit log."""

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.fl_context_utils import add_job_audit_event

from nvflare_llm_components.flare.headers import is_server
from nvflare_llm_components.flare.tasks import is_simulator
from nvflare_llm_components.policy.job import accept_model, check_adapter, check_initial
from nvflare_llm_components.policy.limits import check_free_disk, check_model_bytes
from nvflare_llm_components.policy.model_files import check_model_folder
from nvflare_llm_components.policy.places import JobPlaces, earlier_run
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import SitePolicy, read_policy
from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.text import printable

_HEAD = 6  # characters by which a variable's value is recognized
_PACKAGE = Path(__file__).parents[1]


def policy_of(fl_ctx: FLContext) -> SitePolicy:
    """The policy in this kit's ``local`` folder; the defaults outside of a kit.

    Raises:
        PolicyError: the file can't be used.
    """
    workspace = _workspace(fl_ctx)
    return SitePolicy() if workspace is None else read_policy(Path(workspace.get_site_config_dir()))


def places_of(fl_ctx: FLContext, policy: SitePolicy) -> JobPlaces:
    """Where the job of a context may read."""
    workspace = _workspace(fl_ctx)
    app = None if workspace is None else Path(workspace.get_app_dir(fl_ctx.get_job_id()))
    return JobPlaces(policy.places, app)


def accepted_start(fl_ctx: FLContext, model_name_or_path: str | None) -> str | None:
    """The folder or hub name of the model that a job starts from, as the policy of this kit accepts it.

    Args:
        fl_ctx: of the server, or of a site of a Swarm.
        model_name_or_path: as the job gives it; what it has not set is left to who opens it.

    Raises:
        PolicyError: this kit's policy refuses it, or a site's own weights would leave; audited.
    """
    if not model_name_or_path or "{" in model_name_or_path:
        return model_name_or_path
    with _audited(fl_ctx):
        policy = policy_of(fl_ctx)
        model = accept_model("model_name_or_path", model_name_or_path, places_of(fl_ctx, policy))
        if not is_server(fl_ctx) and fl_ctx.get_process_type() is not None:
            check_initial(model, policy, "the persistor of a site")
        return model.name_or_path


def accepted_adapter(fl_ctx: FLContext, peft_config: dict[str, Any] | None) -> None:
    """Check an adapter's settings against the package's allow-list and the policy of this kit.

    Raises:
        PolicyError: naming the setting; audited.
    """
    with _audited(fl_ctx):
        check_adapter(peft_config, policy_of(fl_ctx))


def accepted_run(fl_ctx: FLContext, argument: str, value: str, *, may_be_brought: bool = False) -> Path:
    """The run directory of an earlier job that a job may continue here.

    Args:
        fl_ctx: of the job.
        argument: the job's argument, for the error.
        value: the path that it gives.
        may_be_brought: whether the server may take it out of the job's own app: its model, which is the
            job's in any case. Training or filter state is only ever what was kept here.

    Raises:
        PolicyError: it is none of this site's, or another submitter's; audited.
    """
    with _audited(fl_ctx):
        further = [Path(entry) for entry in policy_of(fl_ctx).places.runs]
        workspace, job_id = _workspace(fl_ctx), fl_ctx.get_job_id()
        if workspace is None:
            return earlier_run(argument, value, further=further)
        if may_be_brought and (is_server(fl_ctx) or is_simulator(fl_ctx)):
            further.append(Path(workspace.get_app_dir(job_id)))
        if is_simulator(fl_ctx):  # the job's author is who runs it, and each run has a workspace of its own
            return earlier_run(
                argument, value, further=further, site_name=Path(workspace.get_root_dir()).name
            )
        return earlier_run(argument, value, Path(workspace.get_run_dir(job_id)), further)


def accepted_folder(fl_ctx: FLContext, folder: Path) -> Path:
    """The folder of a model that an earlier run left, held to what one is held to that the job names.

    Raises:
        PolicyError: its configuration is absurd, or lets code be fetched; audited.
    """
    with _audited(fl_ctx):
        check_model_folder(folder, is_brought=False, is_trained=False)
        return folder


def accepted_size(fl_ctx: FLContext, num_weights: int) -> None:
    """Check that a global model is not larger than a model may be here: an average is float32.

    Raises:
        PolicyError: it is; audited.
    """
    with _audited(fl_ctx):
        check_model_bytes(4 * num_weights, policy_of(fl_ctx).limits)


def accepted_write(fl_ctx: FLContext, folder: Path) -> None:
    """Check that a disk has the room that a job must leave on it, before more is written.

    Raises:
        PolicyError: it has not; audited.
    """
    with _audited(fl_ctx):
        check_free_disk(folder, policy_of(fl_ctx).limits)


@contextmanager
def _audited(fl_ctx: FLContext) -> Iterator[None]:
    try:
        yield
    except PolicyError as error:
        audit(fl_ctx, error)
        raise


def audit(fl_ctx: FLContext, error: PolicyError) -> None:
    """Write a refusal into FLARE's audit log, where the process has one."""
    add_job_audit_event(fl_ctx, msg=f"nvflare_llm refused: {printable(error)}")


def told(fl_ctx: FLContext, error: BaseException) -> str:
    """What the server is told of an error: never data.

    Args:
        fl_ctx: of the task, with the site whose policy says how much is told.
        error: what the task raised.

    Returns:
        The text of an error of ours. One of a library may quote a row: of that its type, and the line of ours
        that met it.
    """
    try:
        how_much = policy_of(fl_ctx).leaves.errors
    except PolicyError:
        how_much = "kind"
    if how_much == "reason" and isinstance(error, ReportableError):
        return f"{type(error).__name__}: {without_values(printable(error, 1000), os.environ)}"
    return f"{type(error).__name__} at {_own_place(error)}; the text is in this site's own log.txt"


def without_values(text: str, environ: Mapping[str, str]) -> str:
    """A text with the values of environment variables, or as much of one as is in it, replaced by names.

    FLARE puts any variable of a site that a job names into the job's arguments: what was found there is
    an administrator's secret as soon as it is told.
    """
    for name, value in sorted(environ.items(), key=lambda item: -len(item[1])):
        ways = [way for way in (value, repr(value)[1:-1]) if len(way) >= _HEAD]
        for head in dict.fromkeys(way[:_HEAD] for way in ways):
            alike = [way for way in ways if way.startswith(head)]
            end = 0
            while (begin := text.find(head, end)) >= 0:
                end = begin + len(f"{{${name}}}")
                text = f"{text[:begin]}{{${name}}}{_beyond(text[begin:], alike)}"
    return text


def _beyond(text: str, beginnings: Sequence[str]) -> str:
    """What is left of a text after the longest beginning that it has in common with one of several."""
    common = (
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, beginning, strict=False)))
        for beginning in beginnings
    )
    return text[max(common) :]


def traceback_of(error: BaseException) -> str:
    """The whole of an error for this site's own log; what came from outside can forge no line of it."""
    lines, cause = [], error.__cause__ or error.__context__
    if cause is not None:
        lines = [traceback_of(cause), "which led to:\n"]
    frames = traceback.format_tb(error.__traceback__)
    return "".join([*lines, *frames, f"{type(error).__name__}: {printable(error, 4000)}\n"])


def _own_place(error: BaseException) -> str:
    frames = [
        f"{Path(frame.filename).relative_to(_PACKAGE.parent)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    return frames[-1] if frames else "a place outside this package"


def _workspace(fl_ctx: FLContext) -> Any:
    return fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
