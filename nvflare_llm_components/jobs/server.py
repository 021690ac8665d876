"""Choices to ``config_fed_server.json``. What is there for a reason is explained in job_configs/README.md."""

from nvflare_llm_components.jobs.choices import AVERAGES, JobChoices
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


def server_config(choices: JobChoices) -> Json:
    """``config_fed_server.json`` of a job."""
    is_swarm = choices.workflow == "swarm"
    config = {
        **given(
            format_version=2,
            model=None if is_swarm else choices.model,
            num_clients=None if choices.workflow in ("cyclic", "swarm") else len(choices.site_names),
        ),
        **({"quorum": choices.quorum, "grace_s": choices.grace_s} if choices.workflow == "fedavg" else {}),
        **given(
            num_rounds=choices.rounds,
            precision=None if is_swarm else choices.precision,
            peft_config=None if is_swarm else choices.peft_config,
            fedprox_mu=choices.fedprox_mu,
        ),
        **(_server_optimizer(choices) if choices.workflow == "fedopt" else {}),
        "server": {"task_request_interval": 0.5},
        "workflows": _workflows(choices),
        "components": [_tensorboard()] if is_swarm else _server_components(choices),
    }
    if not is_swarm:
        config["task_data_filters"] = [filter_entry(TASKS, quantize(choices))]
        config["task_result_filters"] = [filter_entry(TASKS, component("filters.PrecisionDequantizeFilter"))]
    return config


def _workflows(choices: JobChoices) -> list[Json]:
    found = [_training_workflow(choices)]
    if choices.weights_from == "sites":
        path = "workflows.initialize_global_weights.InitializeGlobalWeights"
        found.insert(0, component(path, id="initialize", root=FLARE, task_name="get_weights"))
    if choices.evaluates_final:
        found.append(component("workflows.FinalEvaluation", id="final_evaluation"))
    located: Json = {"model_locator_id": "locator", "validation_timeout": 36000}
    if choices.evaluate_models == "server":
        path = "workflows.global_model_eval.GlobalModelEval"
        found.append(component(path, id="global_model_eval", root=FLARE, **located))
    elif choices.evaluate_models == "cross-site":
        path = "workflows.cross_site_model_eval.CrossSiteModelEval"
        found.append(component(path, id="cross_site_eval", root=FLARE, submit_model_timeout=3600, **located))
    return found


def _training_workflow(choices: JobChoices) -> Json:
    rounds = {"num_rounds": "{num_rounds}"}
    parts = {"persistor_id": "persistor", "shareable_generator_id": "shareable_generator"}
    if choices.workflow == "fedavg":
        further: Json = {"fedprox_mu": "{fedprox_mu}"} if choices.fedprox_mu is not None else {}
        if choices.average != "mean":
            name = AVERAGES[choices.average]
            further["aggregator"] = component(f"aggregators.{name}", **choices.average_settings)
        clients = {"num_clients": "{num_clients}", "quorum": "{quorum}", "grace_s": "{grace_s}"}
        return component("workflows.QuorumFedAvg", id="fedavg", **clients, **rounds, **further)
    if choices.workflow == "cyclic":
        path = "workflows.cyclic_ctl.CyclicController"
        return component(
            path,
            id="cyclic",
            root=FLARE,
            **rounds,
            task_assignment_timeout=600,
            **parts,
            task_name="train",
        )
    if choices.workflow == "swarm":
        path = "ccwf.swarm_server_ctl.SwarmServerController"
        timeouts = {"start_task_timeout": 600, "progress_timeout": 36000}
        return component(path, id="swarm", root=FLARE, **rounds, **timeouts)
    path = "workflows.scatter_and_gather.ScatterAndGather"
    clients = {"min_clients": "{num_clients}"}
    return component(
        path, id="scatter_and_gather", root=FLARE, **clients, **rounds, **parts, aggregator_id="aggregator"
    )


def _server_components(choices: JobChoices) -> list[Json]:
    keep = ["last", "best", f"every {choices.keep_every}"] if choices.keep_every else None
    model = {"model_name_or_path": "{model}", **adapter(choices)}
    initial = "sites" if choices.weights_from == "sites" else None
    found = [
        component(
            "persistors.SafetensorsModelPersistor",
            id="persistor",
            **model,
            **given(keep=keep, initial_weights=initial),
        )
    ]
    if choices.evaluate_models != "none":
        found.append(component("persistors.SafetensorsModelLocator", id="locator"))
        path = "widgets.validation_json_generator.ValidationJsonGenerator"
        found.append(component(path, id="results", root=FLARE))
    found += _averaging(choices, model)
    if choices.workflow != "cyclic" and choices.validation:
        found.append(selector())
    return [*found, _tensorboard(), component("widgets.RoundLog", id="round_log")]


def _averaging(choices: JobChoices, model: Json) -> list[Json]:
    """What FLARE's workflows other than FedAvg want beside them."""
    if choices.workflow == "fedavg":
        return []
    if choices.workflow == "fedopt":
        optimizer = {
            "path": "torch.optim.SGD",
            "config_type": "dict",
            "args": {"lr": "{server_learning_rate}", "momentum": "{server_momentum}"},
        }
        stepping = component(
            "pt.fedopt.PTFedOptModelShareableGenerator",
            id="shareable_generator",
            root="nvflare.app_opt",
            source_model="server_model",
            device="cpu",
            optimizer_args=optimizer,
        )
        server_model = component("server_model.SafetensorsModule", id="server_model", **model)
        return [server_model, stepping, aggregator(choices)]
    return [generator(), *([] if choices.workflow == "cyclic" else [aggregator(choices)])]


def _server_optimizer(choices: JobChoices) -> Json:
    return {"server_learning_rate": choices.server_lr, "server_momentum": choices.server_momentum}


def _tensorboard() -> Json:
    path = "tracking.tb.tb_receiver.TBAnalyticsReceiver"
    return component(path, id="tensorboard", root="nvflare.app_opt", events=["fed.analytix_log_stats"])
