"""What a task and its context tell the executor."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

from nvflare_llm_components.flare.headers import WIRE_MARKER
from nvflare_llm_components.policy.training import check_fedprox_mu
from nvflare_llm_components.tensors.errors import ReportableError

_MAX_ROUNDS = 10**6


class BadRequestError(ReportableError):
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
    return dxo.data, check_fedprox_mu(dxo.meta.get(AlgorithmConstants.FEDPROX_MU))


@dataclass(frozen=True)
class FederationRound:
    """Which of the federation's rounds a task belongs to, as far as the workflow tells.

    Attributes:
        number: The round's number; 0 if it is not told.
        first: Number of the job's first round; None if it is not told.
        num_rounds: Rounds of the whole job, counted from ``first``; None if it is not told.
    """

    number: int
    first: int | None
    num_rounds: int | None

    @property
    def num_left(self) -> int:
        """Rounds that the job has after this one; 0 if that is not told."""
        return max((self.first or 0) + (self.num_rounds or 0) - 1 - self.number, 0)


def round_of(shareable: Shareable) -> FederationRound:
    """The round of a task, from its headers.

    Raises:
        BadRequestError: A header is no number of a round.
    """
    names = (AppConstants.CURRENT_ROUND, AppConstants.START_ROUND, AppConstants.NUM_ROUNDS)
    number, first, num_rounds = (_count(name, shareable.get_header(name)) for name in names)
    return FederationRound(number or 0, first, num_rounds)


def _count(name: str, found: object) -> int | None:
    if found is None:
        return None
    if type(found) is not int or not 0 <= found < _MAX_ROUNDS:
        raise BadRequestError(f"Task header '{name}': expected a number from 0, found {found!r:.80}.")
    return found


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that may be averaged: numbers, without NaN and Inf."""
    numbers = {str(name): value for name, value in metrics.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def is_simulator(fl_ctx: FLContext) -> bool:
    """Whether FLARE may end this process as soon as its task is answered."""
    return bool(fl_ctx.get_job_id() == SimulatorConstants.JOB_NAME)


def folders_of(fl_ctx: FLContext) -> tuple[Path, Path]:
    """The run directory of this job at this site, and the folder of its app."""
    workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
    job_id = fl_ctx.get_job_id()
    return Path(workspace.get_run_dir(job_id)), Path(workspace.get_app_dir(job_id))
