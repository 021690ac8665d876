"""What a job trains with at this site: as the gate accepts it, and as much as this machine gives it."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from nvflare.apis.fl_context import FLContext

from nvflare_llm_components.flare.site import places_of, policy_for_job
from nvflare_llm_components.policy.job import AcceptedTraining, accept_training
from nvflare_llm_components.policy.limits import held_processes
from nvflare_llm_components.training.group import processes_for
from nvflare_llm_components.training.rows import RowLimits
from nvflare_llm_components.training.settings import TrainingSettings, given
from nvflare_llm_components.training.sizes import size_of


def accepted_training(arguments: Mapping[str, Any], fl_ctx: FLContext) -> AcceptedTraining:
    """Hold what the executor was given against this site's policy.

    Args:
        arguments: the executor's attributes by name; what is none of its arguments is passed over.
        fl_ctx: of the job.

    Raises:
        PolicyError: this site, or this package, does not accept it.
        ReportableError: a path or name is not given.
    """
    policy = policy_for_job(fl_ctx)
    for name in ("model_name_or_path", "train_data", "eval_data"):
        if name != "eval_data" or arguments[name] is not None:
            given(name, arguments[name])
    names = [field.name for field in fields(TrainingSettings) if field.name in arguments]
    return accept_training({name: arguments[name] for name in names}, policy, places_of(fl_ctx, policy))


def settings_of(gate: AcceptedTraining) -> TrainingSettings:
    """The settings of an accepted job, whose model fits this machine.

    Raises:
        PolicyError: the model, or its adapter, is larger than its files hold or than this site gives.
    """
    model, limits = gate.model, gate.policy.limits
    is_known = model.folder is not None and (model.folder / "config.json").is_file()
    if is_known or (model.folder is None and limits.model_gib is not None):
        check_size(gate)
    settings = TrainingSettings(**gate.settings, row_limits=RowLimits(**gate.row_limits))
    return replace(settings, num_processes=held_processes(processes_for(settings), limits))


def check_size(gate: AcceptedTraining) -> None:
    """Check what model and adapter will take, by their configuration.

    Raises:
        PolicyError: as :func:`settings_of`.
    """
    is_limited = gate.policy.limits.model_gib is not None
    peft_config = gate.settings.get("peft_config") if is_limited else None
    size = size_of(gate.model.name_or_path, gate.settings.get("model_kwargs") or {}, peft_config)
    gate.check_model(size.num_weights, size.num_bytes)
