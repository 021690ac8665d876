"""One job at one site: what it asks for, held against the package's allow-lists and the site's policy."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nvflare_llm_components.policy.adapters import check_peft_config
from nvflare_llm_components.policy.limits import check_model_bytes, check_processes
from nvflare_llm_components.policy.model_files import check_borne_out, check_model_folder
from nvflare_llm_components.policy.places import JobPlaces, ModelPlace
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.policy.site import FOR_DIFFERENCES, POLICY_FILE, SitePolicy, Training, beyond
from nvflare_llm_components.policy.training import check_training

Settings = Mapping[str, Any]
_DEFAULTS = {"max_length": 1024, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
_UNBOUNDED = {"max_length"}  # where null is no default, but no limit


@dataclass(frozen=True)
class AcceptedTraining:
    """What a job may train with at a site, and what of it may leave.

    Attributes:
        policy: the site's.
        model: where the job's model lies.
        settings: the executor's arguments: paths resolved, what the job left open at most the site's ceiling.
        row_limits: how much data is read.
    """

    policy: SitePolicy
    model: ModelPlace
    settings: dict[str, Any]
    row_limits: dict[str, int]

    def check_model(self, num_weights: int, num_bytes: int) -> None:
        """Check the size of the job's model, told by its configuration, before it is loaded.

        Args:
            num_weights: of it.
            num_bytes: that they will take.

        Raises:
            PolicyError: it is more than its files hold, or than this site gives.
        """
        if self.model.folder is not None:
            check_borne_out(self.model.folder, num_weights)
        check_model_bytes(num_bytes, self.policy.limits)

    def check_round(self, num_rounds: int, rounds_done: int, num_steps: int) -> None:
        """Check the round that is to begin.

        Args:
            num_rounds: of the job, as the server says.
            rounds_done: here, of this job.
            num_steps: optimizer steps of the round.

        Raises:
            PolicyError: this site lets no job train so long.
        """
        ceilings, rounds = self.policy.training, max(num_rounds, rounds_done + 1)
        if ceilings.rounds is not None and rounds > ceilings.rounds:
            raise beyond("num_rounds", f"at most {ceilings.rounds}", rounds, "training.rounds")
        if ceilings.steps is not None and num_steps > ceilings.steps:
            raise beyond(
                "local_steps or local_epochs",
                f"at most {ceilings.steps} steps a round",
                num_steps,
                "training.steps",
            )

    def check_submission(self, task: str, is_trained: bool) -> None:
        """Check that the site's model as a whole may be sent.

        Args:
            task: what would send it, for the error.
            is_trained: whether it came from the federation, or was trained here from what did.

        Raises:
            PolicyError: only changes or adapters may, or it is still what lies on this site's disk.
        """
        leaves = self.policy.leaves
        if leaves.weights != "all" and "peft_config" not in self.settings:
            raise beyond(f"task {task}", "no whole weights", "a request for them", "leaves.weights")
        if leaves.precision in FOR_DIFFERENCES:
            raise beyond(f"task {task}", "no whole weights", "a request for them", "leaves.precision")
        if not is_trained:
            check_initial(self.model, self.policy, task)

    def check_update(self, num_examples: int) -> None:
        """Check that an update is of enough examples to be sent.

        Raises:
            PolicyError: of fewer than this site sends.
        """
        least = self.policy.leaves.min_examples
        if num_examples < least:
            raise beyond(
                "local_steps or local_epochs",
                f"at least {least} examples",
                num_examples,
                "leaves.min_examples",
            )

    def told_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics that may leave, in the digits that they may have."""
        leaves = self.policy.leaves
        kept = {k: v for k, v in metrics.items() if leaves.metrics is None or k in leaves.metrics}
        return {name: leaves.rounded(value) for name, value in kept.items()}

    def told_curve(self, tag: str, value: float) -> float | None:
        """A point of a curve such as ``train/loss``, rounded; None if it may not leave."""
        leaves = self.policy.leaves
        metric = tag.removeprefix("round/").replace("/", "_")
        may_leave = leaves.curves and (leaves.metrics is None or metric in leaves.metrics)
        return leaves.rounded(value) if may_leave else None

    def limited(self, aborted: Callable[[], bool]) -> Callable[[], bool]:
        """`aborted`, which from now on raises once a task has taken the seconds that it may."""
        seconds, started = self.policy.training.task_seconds, time.monotonic()

        def is_over() -> bool:
            if seconds is not None and time.monotonic() - started > seconds:
                raise beyond("task", f"at most {seconds} s", "more", "training.task_seconds")
            return aborted()

        return is_over


def accept_training(arguments: Settings, policy: SitePolicy, places: JobPlaces) -> AcceptedTraining:
    """Accept what the executor was given, or refuse it by name.

    Args:
        arguments: the executor's, by name.
        policy: the site's.
        places: where the site lets this job read.

    Raises:
        PolicyError: naming the argument, what this site expects, what was found, and what to do.
    """
    check_training(
        sft_config=arguments.get("sft_config"),
        model_kwargs=arguments.get("model_kwargs"),
        local_epochs=arguments.get("local_epochs"),
        local_steps=arguments.get("local_steps"),
        num_processes=arguments.get("num_processes"),
        sharding=arguments.get("sharding"),
        offload=arguments.get("offload"),
    )
    check_processes(arguments.get("num_processes"), policy.limits)
    check_adapter(arguments.get("peft_config"), policy)
    _check_leaving(arguments, policy)
    model = places.model("model_name_or_path", arguments["model_name_or_path"])
    if model.folder is not None:
        check_model_folder(model.folder, is_brought=model.is_brought, is_trained=True)
    paths = {
        name: places.data_file(name, arguments[name])
        for name in ("train_data", "eval_data")
        if arguments.get(name) is not None
    }
    settings = {
        **{name: value for name, value in arguments.items() if value is not None},
        **paths,
        "model_name_or_path": model.name_or_path,
        "sft_config": _held_to(arguments, policy.training),
    }
    return AcceptedTraining(policy, model, settings, policy.data.model_dump())


def check_adapter(peft_config: Settings | None, policy: SitePolicy) -> None:
    """Check an adapter's settings; None trains all weights.

    Raises:
        PolicyError: naming the setting.
    """
    check_peft_config(peft_config)
    if peft_config is None:
        return
    kinds, max_rank = policy.adapters.kinds, policy.adapters.max_rank
    if kinds is not None and peft_config.get("peft_type") not in kinds:
        raise beyond(
            "peft_config.peft_type", f"one of {kinds}", peft_config.get("peft_type"), "adapters.kinds"
        )
    ranks = {key: peft_config.get(key) for key in ("r", "init_r", "target_r", "num_ranks")}
    ranks |= {f"rank_pattern.{name}": rank for name, rank in (peft_config.get("rank_pattern") or {}).items()}
    for key, rank in ranks.items():
        if max_rank is not None and (rank or 0) > max_rank:
            raise beyond(f"peft_config.{key}", f"at most {max_rank}", rank, "adapters.max_rank")


def accept_model(argument: str, value: str, places: JobPlaces) -> ModelPlace:
    """The model that a server starts from.

    Raises:
        PolicyError: it lies where this server lets no job read, or its configuration is absurd.
    """
    model = places.model(argument, value)
    if model.folder is not None:
        check_model_folder(model.folder, is_brought=model.is_brought, is_trained=False)
    return model


def check_initial(model: ModelPlace, policy: SitePolicy, task: str) -> None:
    """Check that a model may leave as it lies at the site.

    Args:
        model: where it lies.
        policy: the site's.
        task: what would send it, for the error.

    Raises:
        PolicyError: it may not.
    """
    choice = policy.leaves.initial_weights
    if choice == "any" or (choice == "named" and (model.is_named or model.is_brought)):
        return
    raise PolicyError(
        f"{task}: expected a model that the federation has trained here, found none yet: this site's own "
        "weights would be sent. The site's administrator allows that as leaves.initial_weights in "
        f"local/{POLICY_FILE}."
    )


def _check_leaving(arguments: Settings, policy: SitePolicy) -> None:
    if policy.leaves.precision in FOR_DIFFERENCES and arguments.get("params_type") != "DIFF":
        raise beyond("params_type", '"DIFF"', arguments.get("params_type"), "leaves.precision")
    choice, is_adapter = policy.leaves.weights, arguments.get("peft_config") is not None
    if is_adapter or choice == "all" or (choice == "updates" and arguments.get("params_type") == "DIFF"):
        return
    expected = "an adapter" if choice == "adapters" else 'an adapter, or params_type "DIFF"'
    raise beyond("peft_config and params_type", expected, "whole weights", "leaves.weights")


def _held_to(arguments: Settings, ceilings: Training) -> dict[str, Any]:
    """The job's ``sft_config``; what it leaves open is at most the site's ceiling.

    Raises:
        PolicyError: the job asks for more.
    """
    chosen: dict[str, Any] = dict(arguments.get("sft_config") or {})
    for key, ceiling, name in (
        ("max_length", ceilings.max_length, "max_length"),
        ("per_device_train_batch_size", ceilings.batch_size, "batch_size"),
        ("per_device_eval_batch_size", ceilings.batch_size, "batch_size"),
        ("dataloader_num_workers", ceilings.dataloader_workers, "dataloader_workers"),
        ("dataset_num_proc", ceilings.dataloader_workers, "dataloader_workers"),
    ):
        if ceiling is None:
            continue
        asked = chosen.get(key)
        if (asked is None and key in chosen and key in _UNBOUNDED) or (asked or 0) > ceiling:
            raise beyond(f"sft_config.{key}", f"at most {ceiling}", asked, f"training.{name}")
        if asked is None and _DEFAULTS.get(key, 0) > ceiling:
            chosen[key] = ceiling
    return chosen
