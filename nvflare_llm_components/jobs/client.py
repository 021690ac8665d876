"""Choices to ``config_fed_client.json``. What is there for a reason is explained in job_configs/README.md."""

from nvflare_llm_components.jobs.choices import JobChoices
from nvflare_llm_components.jobs.parts import (
    FLARE,
    TASKS,
    Json,
    adapter,
    aggregator,
    component,
    filter_entry,
    generator,
    given,
    quantize,
    selector,
)
from nvflare_llm_components.policy.site import FOR_DIFFERENCES

_BETWEEN_SITES = ["swarm_learn", "swarm_report_learn_result"]


def client_config(choices: JobChoices, site: str | None = None) -> Json:
    """``config_fed_client.json`` of a job.

    Args:
        choices: of the job.
        site: one with settings of its own; None for all others.
    """
    own = choices.per_site.get(site, {}) if site else {}
    is_swarm = choices.workflow == "swarm"
    config = {
        "format_version": 2,
        "model": own.get("model", choices.model),
        "data_root": own.get("data", choices.data),
        **_budget(choices, own),
        "learning_rate": own.get("lr", choices.lr),
        "batch_size": own.get("batch_size", choices.batch_size),
        "max_length": own.get("max_length", choices.max_length),
        **given(
            num_clients=len(choices.site_names) if is_swarm else None,
            precision=choices.precision,
            peft_config=choices.peft_config,
        ),
        "get_task_timeout": 3600,
        "submit_task_result_timeout": 3600,
        "executors": [
            {"tasks": TASKS, "executor": component("executors.HFSFTExecutor", **_executor_args(choices, own))}
        ],
        "components": [_analytics(), *_membership(choices)],
    }
    if is_swarm:
        return _with_swarm(config, choices)
    config["task_data_filters"] = [
        filter_entry(TASKS, component("filters.PrecisionDequantizeFilter", lazy=True))
    ]
    feedback = {"error_feedback": True} if choices.precisions.intersection(FOR_DIFFERENCES) else {}
    config["task_result_filters"] = [filter_entry(TASKS, quantize(choices, **feedback))]
    return config


def _budget(choices: JobChoices, own: Json) -> Json:
    for source in (own, {"local_steps": choices.local_steps}, {"local_epochs": choices.local_epochs}):
        for name in ("local_steps", "local_epochs"):
            if source.get(name) is not None:
                return {name: source[name]}
    raise ValueError("local_epochs and local_steps: expected one of them. Found none.")


def _executor_args(choices: JobChoices, own: Json) -> Json:
    (budget,) = _budget(choices, own)
    rows = "{data_root}/{SITE_NAME}"
    return {
        "model_name_or_path": "{model}",
        "train_data": f"{rows}/training.jsonl",
        **given(eval_data=f"{rows}/validation.jsonl" if choices.validation else None),
        budget: f"{{{budget}}}",
        **given(
            params_type=choices.params_type,
            keep_best_local=True if choices.evaluate_models == "cross-site" else None,
            peft_config="{peft_config}" if choices.peft_config else None,
            model_kwargs=dict(choices.model_kwargs) or None,
        ),
        **choices.executor,
        "sft_config": {
            "learning_rate": "{learning_rate}",
            "per_device_train_batch_size": "{batch_size}",
            "per_device_eval_batch_size": "{batch_size}",
            "max_length": "{max_length}",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "seed": 0,
            **choices.sft,
        },
    }


def _analytics() -> Json:
    path = "widgets.convert_to_fed_event.ConvertToFedEvent"
    return component(path, id="analytics", root=FLARE, events_to_convert=["analytix_log_stats"])


def _membership(choices: JobChoices) -> list[Json]:
    """What leaves a lost site to the quorum; other workflows have none, and end."""
    is_needed = choices.workflow == "fedavg"
    return [component("widgets.QuorumMember", id="quorum_member")] if is_needed else []


def _with_swarm(config: Json, choices: JobChoices) -> Json:
    """In Swarm each site has what is the server's elsewhere, and messages go between sites."""
    controller = component(
        "ccwf.swarm_client_ctl.SwarmClientController",
        root=FLARE,
        learn_task_name="train",
        persistor_id="persistor",
        shareable_generator_id="shareable_generator",
        aggregator_id="aggregator",
        min_responses_required="{num_clients}",
        learn_task_ack_timeout=3600,
        final_result_ack_timeout=3600,
    )
    persistor = component(
        "persistors.SafetensorsModelPersistor",
        id="persistor",
        model_name_or_path="{model}",
        **adapter(choices),
    )
    best = [selector()] if choices.validation else []
    restore = component("filters.PrecisionDequantizeFilter")
    return {
        **config,
        "executors": [*config["executors"], {"tasks": ["swarm_*"], "executor": controller}],
        "components": [persistor, generator(), aggregator(choices), *best, *config["components"]],
        "task_data_filters": [
            filter_entry(_BETWEEN_SITES, quantize(choices), direction="out"),
            filter_entry(_BETWEEN_SITES, restore, direction="in"),
        ],
    }
