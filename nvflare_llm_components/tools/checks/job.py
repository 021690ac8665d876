"""Checks of a job's files alone: variables, classes, filters, agreement of both sides, numbers of sites."""

import inspect
import json
import re
from collections.abc import Iterator
from importlib import import_module

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

from nvflare_llm_components.components import COMPONENTS
from nvflare_llm_components.flare.gate import KIND_ARGUMENTS, executor_of
from nvflare_llm_components.jobs.read import unset_sentence, unset_variables
from nvflare_llm_components.policy.adapters import check_peft_config
from nvflare_llm_components.policy.site import FOR_DIFFERENCES
from nvflare_llm_components.policy.training import check_training
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools.checks.subject import (
    DEQUANTIZE,
    PERSISTOR,
    QUANTIZE,
    Finding,
    Json,
    Subject,
    args_of,
    by_sentence,
    components_of,
    error,
    note,
    warning,
)

_KNOWN = {"SITE_NAME", "WORKSPACE", "JOB_ID", "ROOT_URL", "SECURE_MODE"}


def check_variables(subject: Subject) -> Iterator[Finding]:
    """Variables in braces are defined: in the environment of this machine, or at the top of the file."""
    for name in dict.fromkeys(name for text in subject.texts.values() for name in unset_variables(text)):
        yield error(unset_sentence(name))
    for file, text in subject.texts.items():
        used = dict.fromkeys(re.findall(r"\{(\w+)\}", text))
        defined = json.loads(text).keys() | _KNOWN
        for name in (name for name in used if name not in defined):
            yield error(f"{file}: '{{{name}}}' stands for a variable that the file does not define.")


def check_sites(subject: Subject) -> Iterator[Finding]:
    """Names of sites, and each has an app."""
    doubled = {site for site in subject.sites if subject.sites.count(site) > 1}
    if doubled or not subject.sites:
        yield error(f"sites: expected different names. Found {', '.join(sorted(doubled)) or 'none'} twice.")
    for site in subject.sites:
        if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", site):
            yield error(f"sites: expected names of letters, digits, - and _. Found {printable(site, 60)!r}.")


def check_numbers(subject: Subject) -> Iterator[Finding]:
    """The job's number of sites is that of the sites there are."""
    meta = json.loads((subject.job / "meta.json").read_text(encoding="utf-8"))
    num_sites, least = len(subject.sites), meta.get("min_clients", 1)
    if isinstance(least, int) and least > num_sites:
        yield error(
            f"meta.json: min_clients is {least}, and there are {num_sites} sites: the job would wait for "
            f"ever. Write it anew with `nvflare-llm job --sites {num_sites}`, or set min_clients."
        )
    wanted = subject.workflow.get("num_clients", subject.workflow.get("min_clients"))
    if isinstance(wanted, int) and wanted > num_sites:
        yield error(
            f"num_clients: the job gives each round to {wanted} sites. Found {num_sites}. Set num_clients to "
            f"{num_sites} in the server's configuration."
        )
    elif "num_clients" in subject.workflow and isinstance(wanted, int) and wanted < num_sites:
        yield warning(
            f"num_clients: each round is given to {wanted} of the {num_sites} sites, drawn at random. For "
            f"all of them set num_clients to {num_sites} in the server's configuration."
        )


def check_classes(subject: Subject) -> Iterator[Finding]:
    """Each class exists, takes its arguments, and accepts them where it is ours."""
    known = {*COMPONENTS, *DEFAULT_CLASS_ALLOW_LIST, *subject.also}
    for side, config in [("server", subject.server), *subject.clients.items()]:
        for path, args in components_of(config):
            if path in known or (path.startswith("nvflare.") and path.rpartition(".")[0].count(".") > 1):
                if sentence := _refusal(path, args):
                    yield error(f"{side}: {sentence}")
            elif path.startswith("nvflare_llm_components."):
                yield error(f"{side}: {printable(path, 120)}: it is not a component of this package.")


def _refusal(path: str, args: Json) -> str | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return f"{printable(path, 120)}: expected a class that is installed. Found none."
    try:
        inspect.signature(found).bind(**args)
        if path in COMPONENTS:
            found(**args)
    except (TypeError, ValueError) as refused:
        return f"{name}: {printable(refused, 300)}"
    return None


def check_settings(subject: Subject) -> Iterator[Finding]:
    """What the job sets of training and adapter is allowed and in its range."""

    def found() -> Iterator[tuple[str, str]]:
        for site, args in subject.executors.items():
            try:
                check_training(
                    sft_config=args.get("sft_config"),
                    model_kwargs=args.get("model_kwargs"),
                    local_epochs=args.get("local_epochs"),
                    local_steps=args.get("local_steps"),
                )
                check_peft_config(args.get("peft_config"))
            except ValueError as refused:
                yield site, str(refused)
            if args.get("local_epochs") is not None and args.get("local_steps") is not None:
                yield site, "local_steps and local_epochs: expected one of them. Found both. Remove one."

    return (error(f"{sites}: {sentence}") for sites, sentence in by_sentence(found()))


def check_executor(subject: Subject) -> Iterator[Finding]:
    """Each site trains, by our executor or all by another."""
    if not subject.executors and all(client.get("executors") for client in subject.clients.values()):
        yield note("executors: none is HFSFTExecutor, so that models and rows were not looked at.")
        return
    for site in sorted(subject.clients.keys() - subject.executors.keys()):
        yield error(f"{site}: expected an executor HFSFTExecutor in the client's configuration. Found none.")


def check_adapters(subject: Subject) -> Iterator[Finding]:
    """Both sides name the same adapter."""
    for persistor in args_of(subject.server, PERSISTOR):
        for site, args in subject.executors.items():
            ours, theirs = persistor.get("peft_config"), args.get("peft_config")
            if ours != theirs:
                yield error(
                    f"peft_config: the server's and that of {site} should be equal. Found "
                    f"{_difference(ours, theirs)}."
                )


def _difference(ours: Json | None, theirs: Json | None) -> str:
    if not ours or not theirs:
        return f"{'one' if ours else 'none'} on the server and {'one' if theirs else 'none'} at the site"
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    return ", ".join(f"{key}: {ours.get(key)!r} and {theirs.get(key)!r}" for key in keys)


def check_filters(subject: Subject) -> Iterator[Finding]:
    """What one side encodes the other decodes, by tasks that are spelled out."""
    for site, client in subject.clients.items():
        directions = (
            ("server", subject.server, site, client, "task_data_filters"),
            (site, client, "server", subject.server, "task_result_filters"),
        )
        for sender, sending, receiver, receiving, chain in directions:
            missing = sorted(_tasks(sending, chain, QUANTIZE) - _tasks(receiving, chain, DEQUANTIZE) - {"*"})
            if missing and not _is_between_sites(client):
                yield error(
                    f"{chain} of {receiver}: expected PrecisionDequantizeFilter for {', '.join(missing)}, "
                    f"which {sender} encodes. Found none. Add it for these tasks."
                )
        for chain in ("task_data_filters", "task_result_filters"):
            if any("*" in _tasks(side, chain, each) for side in (subject.server, client) for each in _BOTH):
                yield error(f"{chain}: FLARE compares task names exactly, and '*' is none. Write the tasks.")


_BOTH = (QUANTIZE, DEQUANTIZE)


def _tasks(config: Json, chain: str, path: str) -> set[str]:
    entries = config.get(chain) or []
    return {
        task
        for entry in entries
        if any(found == path for found, _ in components_of(entry.get("filters", [])))
        for task in entry.get("tasks", [])
    }


def _is_between_sites(client: Json) -> bool:
    return any("direction" in entry for entry in client.get("task_data_filters") or [])


def check_precision(subject: Subject) -> Iterator[Finding]:
    """All send in one precision; what is rounded is a change, with error feedback at 4 bits and below."""
    named = {"server": [args.get("precision", "fp16") for args in args_of(subject.server, QUANTIZE)]}
    for site, client in subject.clients.items():
        named[site] = [args.get("precision", "fp16") for args in args_of(client, QUANTIZE)]
    used = {site: names[0] for site, names in named.items() if names}
    if len(set(used.values())) > 1:
        found = ", ".join(f"{name} {precision}" for name, precision in used.items())
        yield warning(f"precision: expected one for all. Found {found}. Set the same in both configurations.")
    for site, client in subject.clients.items():
        yield from _check_changes(site, client)


def _check_changes(site: str, client: Json) -> Iterator[Finding]:
    executor = executor_of("train", client.get("executors", []))
    name, args = KIND_ARGUMENTS.get(str(executor.get("path"))), executor.get("args", {})
    filters = list(args_of(client, QUANTIZE))
    rounded = sorted({each for one in filters for each in _precisions(one)} - {"fp32"})
    of_changes, is_change = [each for each in rounded if each in FOR_DIFFERENCES], args.get(name) == "DIFF"
    if name is None or (is_change and not of_changes):
        return
    if of_changes and not (is_change and all(each.get("error_feedback") for each in filters)):
        yield warning(
            f"{site}: {of_changes[0]} wants {name} DIFF and error_feedback, or rounding adds up in the "
            f"weights. Set both, as `nvflare-llm job --precision {of_changes[0]}` does."
        )
    elif rounded and not is_change and not args.get("peft_config"):
        remedy = "precision to fp32" if _is_between_sites(client) else f"{name} to DIFF"
        yield warning(
            f"{site}: whole weights at {', '.join(rounded)} lose what a round changes by less than half a "
            f"step of the rounding. Set {remedy}."
        )


def _precisions(quantize: Json) -> Iterator[str]:
    overrides = quantize.get("overrides")
    yield str(quantize.get("precision", "fp16"))
    yield from map(str, overrides.values() if isinstance(overrides, dict) else ())


def check_kinds(subject: Subject) -> Iterator[Finding]:
    """The server averages what the sites send: weights, or their change."""
    persistor = next(args_of(subject.server, PERSISTOR), {})
    awaited = {"results.data_kind of the persistor": (persistor.get("results") or {}).get("data_kind")}
    for path, args in components_of(subject.server.get("components", [])):
        default = "WEIGHT_DIFF" if path == _ACCUMULATOR else None
        awaited[f"expected_data_kind of {path.rpartition('.')[2]}"] = args.get("expected_data_kind", default)
    for site, client in subject.clients.items():
        executor = executor_of("train", client.get("executors", []))
        name = KIND_ARGUMENTS.get(str(executor.get("path")))
        told = executor.get("args", {}).get(name, "FULL")
        kind = {"FULL": "WEIGHTS", "DIFF": "WEIGHT_DIFF"}.get(str(told))
        for where, found in awaited.items():
            if name and kind and isinstance(found, str) and found != kind:
                yield error(
                    f"{where}: expected {kind}, which {site} sends ({name} {told}). Found {found}: no result "
                    "would be averaged. Set both alike."
                )


_ACCUMULATOR = (
    "nvflare.app_common.aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator"
)


def check_evaluation(subject: Subject) -> Iterator[Finding]:
    """Where sites have nothing to evaluate on, nobody can say which model is best."""
    without = [site for site, args in subject.executors.items() if not args.get("eval_data")]
    if without:
        yield note(f"eval_data: none at {', '.join(without)}: these sites don't say how good a model is.")


CHECKS = (
    check_variables,
    check_sites,
    check_numbers,
    check_executor,
    check_classes,
    check_settings,
    check_adapters,
    check_filters,
    check_precision,
    check_kinds,
    check_evaluation,
)
