"""Checks of the machine: what the workspace allows, what a message weighs, free disk and memory."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

from nvflare_llm_components.components import COMPONENTS
from nvflare_llm_components.jobs.read import objects_in
from nvflare_llm_components.quantization.precision import PRECISIONS, PrecisionPolicy
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools.allow import allows, site_allow_list
from nvflare_llm_components.tools.checks.subject import (
    QUANTIZE,
    Finding,
    Json,
    Subject,
    args_of,
    components_of,
    error,
    note,
    warning,
)
from nvflare_llm_components.tools.policy import check_job


def check_allowed(subject: Subject) -> Iterator[Finding]:
    """The workspace lets jobs load each class: FLARE refuses the job otherwise."""
    if subject.workspace and (subject.workspace / "local/resources.json").is_file():
        allowed = site_allow_list(subject.workspace)
    else:
        allowed = [*DEFAULT_CLASS_ALLOW_LIST, *COMPONENTS]  # what `nvflare-llm allow` writes
    allowed += subject.also
    paths = {path for side in (subject.server, *subject.clients.values()) for path, _ in components_of(side)}
    paths |= set(_optimizers(subject.server))
    for path in sorted(paths):
        if not any(allows(entry, path) for entry in allowed):
            option = "" if path in COMPONENTS else f" --also {path}"
            where = subject.workspace or "WORKSPACE"
            yield error(
                f"{printable(path, 120)}: the site's class_allow_list does not have it. Type: "
                f"nvflare-llm allow {where}{option}"
            )


def check_policy(subject: Subject) -> Iterator[Finding]:
    """What the sites' own policy refuses; the defaults hold where a workspace has none yet."""
    with tempfile.TemporaryDirectory() as fresh:
        place = subject.workspace
        if place is None or not (place / "local").is_dir():
            place = Path(fresh)
        for site in ("server", *subject.sites):
            for refusal in check_job(subject.job, place, site):
                if "class_allow_list" not in refusal:  # said by check_allowed, with what to type
                    yield error(f"{site}: {refusal}")


def _optimizers(config: Json) -> Iterator[str]:
    """Class paths that a component builds itself, as FedOpt its optimizer."""
    for node in objects_in(config):
        if node.get("config_type") == "dict" and isinstance(node.get("path"), str):
            yield node["path"]


def check_sizes(subject: Subject) -> Iterator[Finding]:
    """The adapter fits the model; what a message weighs; whether disk and memory will do."""
    from nvflare_llm_components.tools.sizes import message_size, meta_state_dict

    site, folder = next(iter(subject.local_models().items()), (None, None))
    if site is None or folder is None or not (folder / "config.json").is_file():
        return
    peft = next((args["peft_config"] for args in subject.executors.values() if args.get("peft_config")), None)
    try:
        state = meta_state_dict(str(folder), json.dumps(peft) if peft else None)
        full = state if peft is None else meta_state_dict(str(folder))
    except (ValueError, OSError, TypeError, KeyError) as refused:
        yield error(f"peft_config or model: {printable(refused, 300)}")
        return
    named = [args.get("precision") for args in args_of(subject.server, QUANTIZE)]
    precision = named[0] if named and named[0] in PRECISIONS else "fp32"
    size = message_size(state, PrecisionPolicy(precision), precision).total_bytes
    sent = sum(tensor.numel() for tensor in state.values())
    whole = sum(tensor.numel() for tensor in full.values())
    yield note(
        f"one message: {size:,} bytes ({precision}, {sent:,} of {whole:,} weights); a round of "
        f"{len(subject.sites)} sites: {2 * len(subject.sites) * size:,} bytes"
    )
    yield from _space(subject, sent, whole)


def _space(subject: Subject, sent: int, whole: int) -> Iterator[Finding]:
    """Rough needs: fp32 weights, gradients and Adam's two moments at each site; models and states on disk."""
    place = subject.workspace or subject.job
    place = next(folder for folder in [place, *place.resolve().parents] if folder.exists())
    disk, free = 4 * sent * (3 + 3 * len(subject.sites)), shutil.disk_usage(place).free
    if disk > free:
        yield error(
            f"{place}: expected about {_gb(disk)} free for models and training states. Found {_gb(free)}. "
            "Give another workspace (-w), or make room."
        )
    memory = len(subject.sites) * 4 * (whole + 3 * sent) + 8 * sent
    available = psutil.virtual_memory().available
    if memory > available:
        yield warning(
            f"memory: {len(subject.sites)} sites on this machine want about {_gb(memory)} for weights, "
            f"gradients and optimizer. Found {_gb(available)} available. Take LoRA, fewer sites at once "
            "(--threads), or a smaller model."
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


CHECKS = (check_allowed, check_policy, check_sizes)
