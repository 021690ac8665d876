"""What a task and its context tell the executor."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

from nvflare_llm_components.conventions import WIRE_MARKER


class BadRequestError(ValueError):
    """A task carries data that the executor cannot use."""


def global_model_of(shareable: Shareable) -> tuple[Mapping[str, Any], float]:
    """The weights in a task (none where the server has none yet), and FedProx's coefficient (0 for none)."""
    try:
        dxo = from_shareable(shareable)
    except (ValueError, KeyError) as error:
        raise BadRequestError(f"Task data: expected a DXO of weights, found none: {error}") from error
    if WIRE_MARKER in dxo.meta:
        raise BadRequestError(
            f"Task data: expected full precision, found a message still encoded ('{WIRE_MARKER}'). "
            "PrecisionDequantizeFilter is missing from this client's task_data_filters for this task."
        )
    if AlgorithmConstants.SCAFFOLD_CTRL_GLOBAL in dxo.meta:
        raise BadRequestError(
            "Task data: found Scaffold's control variates, which this executor does not use. Choose FedAvg."
        )
    if dxo.data_kind != DataKind.WEIGHTS and dxo.data:
        raise BadRequestError(f"Task data: expected data kind WEIGHTS, found {dxo.data_kind}.")
    return dxo.data, float(dxo.meta.get(AlgorithmConstants.FEDPROX_MU) or 0.0)


def rounds_left(shareable: Shareable) -> int:
    """How many rounds the job has after this task's; 0 where the task does not tell."""
    first, planned, present = (
        shareable.get_header(name) or 0
        for name in (AppConstants.START_ROUND, AppConstants.NUM_ROUNDS, AppConstants.CURRENT_ROUND)
    )
    return max(first + planned - 1 - present, 0)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that may be averaged: without NaN and Inf."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def is_simulator(fl_ctx: FLContext) -> bool:
    """Whether FLARE may end this process as soon as its task is answered."""
    return bool(fl_ctx.get_job_id() == SimulatorConstants.JOB_NAME)


def folders_of(fl_ctx: FLContext) -> tuple[Path, Path]:
    """The run directory of this job at this site, and the folder of its app."""
    workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
    job_id = fl_ctx.get_job_id()
    return Path(workspace.get_run_dir(job_id)), Path(workspace.get_app_dir(job_id))
