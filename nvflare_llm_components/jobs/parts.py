"""Components that more than one part of a job names."""

from typing import Any

from nvflare_llm_components.jobs.choices import JobChoices

Json = dict[str, Any]
FLARE = "nvflare.app_common"
TASKS = ["train", "validate", "submit_model", "get_weights"]
"""FLARE looks filters up by exact task name: ``*`` matches nothing there."""
_OURS = "nvflare_llm_components"


def given(**values: Any) -> Json:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def component(path: str, /, *, id: str | None = None, root: str = _OURS, **args: Any) -> Json:
    """A component as FLARE names one: id, class path and arguments."""
    return {**given(id=id), "path": f"{root}.{path}", "args": args}


def filter_entry(tasks: list[str], component: Json, **direction: str) -> Json:
    """One filter for these tasks."""
    return {"tasks": tasks, **direction, "filters": [component]}


def quantize(choices: JobChoices, **args: Any) -> Json:
    """The half of the filters that sends."""
    overrides = given(overrides=dict(choices.overrides) or None)
    return component("filters.PrecisionQuantizeFilter", precision="{precision}", **{**overrides, **args})


def adapter(choices: JobChoices) -> Json:
    """The adapter as an argument, where there is one."""
    return {"peft_config": "{peft_config}"} if choices.peft_config else {}


def generator() -> Json:
    """What applies an average in FLARE's workflows other than FedAvg."""
    path = "shareablegenerators.full_model_shareable_generator.FullModelShareableGenerator"
    return component(path, id="shareable_generator", root=FLARE)


def aggregator(choices: JobChoices) -> Json:
    """What averages there."""
    path = "aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator"
    kind = "WEIGHT_DIFF" if choices.params_type == "DIFF" else "WEIGHTS"
    return component(path, id="aggregator", root=FLARE, expected_data_kind=kind)


def selector() -> Json:
    """What finds the best model."""
    path = "widgets.intime_model_selector.IntimeModelSelector"
    return component(path, id="model_selector", root=FLARE, key_metric="eval_loss", negate_key_metric=True)
