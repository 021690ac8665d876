"""The site that runs this process: its policy, the places that a job may read, and its audit log."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.fl_context_utils import add_job_audit_event

from nvflare_llm_components.flare.headers import is_server
from nvflare_llm_components.flare.tasks import is_simulator
from nvflare_llm_components.policy.job import accept_model, check_adapter, check_initial
from nvflare_llm_components.policy.json_file import check_json_alone
from nvflare_llm_components.policy.limits import check_free_disk, check_model_bytes
from nvflare_llm_components.policy.model_files import check_model_folder
from nvflare_llm_components.policy.places import JobPlaces, earlier_run
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import SitePolicy, read_policy
from nvflare_llm_components.tensors.text import printable


def policy_of(fl_ctx: FLContext) -> SitePolicy:
    """The policy in this kit's ``local`` folder; the defaults outside of a kit.

    Raises:
        PolicyError: the file can't be used.
    """
    workspace = _workspace(fl_ctx)
    return SitePolicy() if workspace is None else read_policy(Path(workspace.get_site_config_dir()))


def policy_for_job(fl_ctx: FLContext) -> SitePolicy:
    """The policy that a job is held to, which is one of JSON alone.

    Raises:
        PolicyError: the file can't be used, or the job's configuration is not JSON.
    """
    workspace = _workspace(fl_ctx)
    if workspace is not None:
        check_json_alone(Path(workspace.get_app_dir(fl_ctx.get_job_id())))
    return policy_of(fl_ctx)


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
        policy = policy_for_job(fl_ctx)
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
        check_adapter(peft_config, policy_for_job(fl_ctx))


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
        further = [Path(entry) for entry in policy_for_job(fl_ctx).places.runs]
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
        workspace = _workspace(fl_ctx)
        app = None if workspace is None else Path(workspace.get_app_dir(fl_ctx.get_job_id())).resolve()
        is_brought = app is not None and folder.resolve().is_relative_to(app)
        check_model_folder(folder, is_brought=is_brought, is_trained=False)
        return folder


def accepted_size(fl_ctx: FLContext, num_weights: int) -> None:
    """Check that a global model is not larger than a model may be here: an average is float32.

    Raises:
        PolicyError: it is; audited.
    """
    with _audited(fl_ctx):
        check_model_bytes(4 * num_weights, policy_for_job(fl_ctx).limits)


def accepted_write(fl_ctx: FLContext, folder: Path) -> None:
    """Check that a disk has the room that a job must leave on it, before more is written.

    Raises:
        PolicyError: it has not; audited.
    """
    with _audited(fl_ctx):
        check_free_disk(folder, policy_for_job(fl_ctx).limits)


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


def _workspace(fl_ctx: FLContext) -> Any:
    return fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
