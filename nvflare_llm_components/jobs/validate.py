"""Refuses choices that give no job, before one is written."""

import inspect
import re
from collections.abc import Mapping

from nvflare_llm_components import aggregators
from nvflare_llm_components.executors import HFSFTExecutor
from nvflare_llm_components.jobs.choices import (
    AVERAGES,
    PER_SITE,
    SHOWN_MODELS,
    WORKFLOWS,
    JobChoices,
)
from nvflare_llm_components.policy.adapters import check_peft_config
from nvflare_llm_components.policy.site import FOR_DIFFERENCES
from nvflare_llm_components.policy.training import BUDGET, check_training
from nvflare_llm_components.quantization.precision import PRECISIONS, PrecisionPolicy
from nvflare_llm_components.tensors.text import printable

_COMPOSED = {
    "model_name_or_path",
    "train_data",
    "eval_data",
    "sft_config",
    "peft_config",
    "model_kwargs",
    "local_epochs",
    "local_steps",
    "params_type",
    "keep_best_local",
}
_SITE = re.compile(r"[A-Za-z0-9][\w.\-]{0,63}")


def checked(choices: JobChoices) -> JobChoices:
    """The choices, if a job can be written of them.

    Raises:
        ValueError: a choice is out of its range, or two don't go together; the message names them.
    """
    for name, allowed in (
        ("workflow", WORKFLOWS),
        ("average", tuple(AVERAGES)),
        ("precision", tuple(PRECISIONS)),
        ("evaluate_models", SHOWN_MODELS),
        ("weights_from", ("server", "sites")),
    ):
        found = printable(getattr(choices, name), 60)
        if found not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}. Found {found!r}.")
    PrecisionPolicy(choices.precision, overrides=choices.overrides or None)
    _check_sites(choices)
    _check_together(choices)
    _check_training(choices)
    _check_arguments(choices)
    return choices


def _check_sites(choices: JobChoices) -> None:
    names = choices.site_names
    wrong = [name for name in names if not _SITE.fullmatch(name)]
    if not names or wrong or len(set(names)) < len(names):
        raise ValueError(
            f"sites: expected a number from 1 on, or different names by commas. "
            f"Found {printable(choices.sites, 80)!r}."
        )
    if choices.rounds < 1:
        raise ValueError(f"rounds: expected 1 or more. Found {choices.rounds}.")
    if choices.quorum is not None and not 1 <= choices.quorum <= len(names):
        raise ValueError(f"quorum: expected 1 to {len(names)}, the number of sites. Found {choices.quorum}.")
    if not 0 <= choices.grace_s < float("inf"):
        raise ValueError(f"grace_s: expected seconds from 0 on. Found {choices.grace_s}.")
    for site, own in choices.per_site.items():
        if site not in names:
            raise ValueError(
                f"per_site: expected one of the sites {', '.join(names)}. Found {printable(site, 60)!r}."
            )
        if not isinstance(own, Mapping) or not own or set(own) - set(PER_SITE):
            raise ValueError(
                f"per_site.{site}: expected settings among {', '.join(PER_SITE)}. Found {printable(own, 80)}."
            )


def _check_together(choices: JobChoices) -> None:
    of_fedavg = {
        "quorum": choices.quorum is not None,
        "fedprox_mu": choices.fedprox_mu is not None,
        "average": choices.average != "mean",
    }
    for name in [name for name, is_set in of_fedavg.items() if is_set and choices.workflow != "fedavg"]:
        raise ValueError(f"{name}: expected workflow fedavg. Found {choices.workflow}.")
    if choices.lora and choices.peft:
        raise ValueError("lora and peft: expected one of them. Found both.")
    of_changes = sorted(choices.precisions.intersection(FOR_DIFFERENCES))
    if of_changes and choices.workflow in ("cyclic", "swarm"):
        raise ValueError(
            f"precision: {of_changes[0]} needs a server that gives all sites one model in a round, and "
            f"{choices.workflow} passes models from site to site. Choose int8."
        )
    if choices.send_changes and choices.workflow == "swarm":
        raise ValueError("send_changes: swarm passes weights from site to site. Leave it out.")
    if choices.weights_from == "sites" and choices.workflow != "scatter-and-gather":
        raise ValueError(f"weights_from: sites needs workflow scatter-and-gather. Found {choices.workflow}.")
    if choices.evaluate_models != "none" and (choices.workflow == "swarm" or not choices.validation):
        raise ValueError("evaluate_models: expected a server and validation rows. Found a job without them.")


def _check_training(choices: JobChoices) -> None:
    check_peft_config(choices.peft_config)
    fixed = {"learning_rate": "lr", "per_device_train_batch_size": "batch_size", "max_length": "max_length"}
    for key in fixed.keys() & choices.sft.keys():
        raise ValueError(f"sft.{key}: it is the choice {fixed[key]}.")
    budget = (
        {"local_epochs": choices.local_epochs}
        if choices.local_steps is None
        else {"local_steps": choices.local_steps}
    )
    for own in ({}, *choices.per_site.values()):
        own_budget = {key: value for key, value in own.items() if key in BUDGET}
        check_training(
            sft_config={
                **choices.sft,
                "learning_rate": own.get("lr", choices.lr),
                "per_device_train_batch_size": own.get("batch_size", choices.batch_size),
                "max_length": own.get("max_length", choices.max_length),
            },
            model_kwargs=choices.model_kwargs,
            **(own_budget or budget),
        )


def _check_arguments(choices: JobChoices) -> None:
    """Settings that go to a component as they are: it must know them, and accept them."""
    if choices.average_settings and not AVERAGES[choices.average]:
        raise ValueError("average_settings: expected an --average that has settings. Found mean.")
    if choices.average != "mean":
        try:
            getattr(aggregators, AVERAGES[choices.average])(**choices.average_settings)
        except TypeError as error:
            raise ValueError(f"average_settings: {error}") from error
    free = inspect.signature(HFSFTExecutor.__init__).parameters.keys() - _COMPOSED - {"self"}
    for key in choices.executor.keys() - free:
        raise ValueError(
            f"executor.{printable(key, 60)}: expected one of {', '.join(sorted(free))}. Others are choices."
        )
