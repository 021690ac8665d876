"""Jobs made by FLARE's Job API or a recipe, without a copy of this package in them."""

from typing import Any, TypeVar

PACKAGE = "nvflare_llm_components"
T = TypeVar("T")


def name_classes_only(job: T) -> T:
    """Let an exported job name the classes of this package, which sites have, and not copy its files.

    FLARE copies the package of every component into ``app/custom``, which makes a job one that brings its own
    code (byoc), unless the job says that the package is there.

    Args:
        job: a ``nvflare.job_config.api.FedJob``, or a recipe of ``nvflare.recipe``, not exported yet.

    Returns:
        The same job.
    """
    fed_job: Any = getattr(job, "_job", job)
    config = fed_job.job
    config.set_app_packages([*config.app_packages, PACKAGE])
    return job
