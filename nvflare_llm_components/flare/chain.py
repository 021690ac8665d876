"""The filters of a site that a result goes through on its way out."""

from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.task_utils import get_filters
from nvflare.private.privacy_manager import Scope


def first_result_filter(task_name: str, fl_ctx: FLContext) -> str:
    """Class path of the filter that a task's result meets first, the site's own before those of the job.

    Returns:
        "" where there is none, or where it can't be told: a task that another task of the site does itself,
        as in Swarm, has no filters of its own.
    """
    configured = getattr(fl_ctx.get_prop(FLContextKey.RUNNER), "task_result_filters", None)
    task = fl_ctx.get_prop_detail(FLContextKey.TASK_NAME) or {}
    if not isinstance(configured, dict) or task.get("value") != task_name or task.get("sticky"):
        return ""  # a name that sticks is one of a task that was: FLARE's runner sets those that are
    name, direction = Scope.TASK_RESULT_FILTERS_NAME, FilterKey.OUT
    found: list[Filter] = get_filters(name, fl_ctx, configured, task_name, direction)
    return f"{type(found[0]).__module__}.{type(found[0]).__qualname__}" if found else ""
