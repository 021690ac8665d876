"""Turns what a dead or finished run left into a job that continues it.

What is to go on is given a second name on disk before anything can remove the first: the simulator wipes its
workspace when it starts, and a deployed server its run directory when a job ends. In the simulator it lies
beside the new job's folder; a deployed job carries the model in its server's app.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from nvflare.apis.job_def import SERVER_SITE_NAME

from nvflare_llm_components.checkpoint.global_models import BEST, FOLDER, LAST, MASTER, earlier_model
from nvflare_llm_components.checkpoint.manifest import read_manifest, verify_files
from nvflare_llm_components.tensors.atomic import replace_folder
from nvflare_llm_components.tensors.links import link_tree, links_in
from nvflare_llm_components.tensors.text import printable
from nvflare_llm_components.tools import continued
from nvflare_llm_components.tools.continued import Config, Rounds
from nvflare_llm_components.tools.find_run import (
    META,
    EarlierRun,
    deployment,
    find_earlier_run,
    goes_to_all,
    read_config,
)
from nvflare_llm_components.tools.runs import read_lines
from nvflare_llm_components.widgets import ROUNDS_FILE, STATE_FOLDERS

SERVER_CONFIG, CLIENT_CONFIG = "config/config_fed_server.json", "config/config_fed_client.json"
CARRIED = "earlier_run"
"""Folder of a server's app with the models that a deployed job goes on from."""

_ON_SERVER = f"{{WORKSPACE}}/{{JOB_ID}}/app_{SERVER_SITE_NAME}/{CARRIED}"
_SIGNATURES = (".__nvfl_sig.json", ".__nvfl_submitter.crt")  # of the earlier job's files


def resume_job(
    run: Path,
    out: Path,
    job: Path | None = None,
    num_rounds: int | None = None,
    does_end: bool = False,
) -> str:
    """Write a job folder that continues a run: its model, the rounds still to do, each site's state.

    Args:
        run: what the earlier run left: the simulator's workspace, the folder that ``nvflare job download``
            wrote, or the server's run directory.
        out: the new job folder; it must not exist. In the simulator, `out`_earlier_run is made beside it.
        job: the earlier job's folder, where it can't be found in `run`.
        num_rounds: rounds of the whole, those done included; None: as the earlier job had it.
        does_end: where all rounds are done, continue with what comes after the last: its evaluation.

    Returns:
        What the new job continues and what was lost, in a few lines.

    Raises:
        ValueError: if there is no run, it has no job of ours in it, its model is damaged, or no round is left
            to do. Nothing is written then.
    """
    out = out.absolute()
    earlier = find_earlier_run(run, job)
    _refuse_links(earlier)
    beside = out.with_name(f"{out.name}_{CARRIED}")
    _refuse_place(earlier, out, beside)
    config = read_config(earlier.apps[earlier.server_app] / SERVER_CONFIG)
    model = _model(earlier, config)
    rounds = _rounds_left(earlier, config, model, num_rounds, does_end)
    lines = [_sentence(model, rounds)]
    if continued.components_of(config, continued.MODULE):
        lines.append("FedOpt's momentum is not kept: the server's optimizer starts afresh.")

    def write_job(folder: Path) -> None:
        lines.extend(_write_job(folder, beside, earlier, model, rounds))

    if not earlier.is_simulated:
        replace_folder(out, write_job)
        return _told(lines)
    try:
        replace_folder(beside, lambda folder: lines.extend(_keep_beside(folder, earlier, config, model)))
        replace_folder(out, write_job)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return _told(lines)


def _told(lines: Sequence[str]) -> str:
    return "\n".join(printable(line, 4000) for line in lines)  # names of sites, studies, metrics


def _refuse_place(earlier: EarlierRun, out: Path, beside: Path) -> None:
    for folder in (out, beside) if earlier.is_simulated else (out,):
        if folder.exists():
            raise ValueError(f"{folder}: expected no such folder, found one. Choose another --out.")
    root = earlier.run_dir.parents[1] if earlier.is_simulated else earlier.run_dir
    if out.resolve().is_relative_to(root):
        raise ValueError(
            f"{out}: expected a folder outside {root}, found one in it, which FLARE removes with the run. "
            "Choose another --out."
        )


def _refuse_links(earlier: EarlierRun) -> None:
    """A run's folder may come from elsewhere: what a link in it names is this machine's."""
    runs = (earlier.run_dir, *earlier.site_dirs.values())
    kept = [run / name for run in runs for name in (FOLDER, *STATE_FOLDERS)]
    for link in (link for folder in [*earlier.apps.values(), *kept] for link in links_in(folder)):
        raise ValueError(
            f"{printable(link)}: expected a file of the run itself, found a link to elsewhere. Put the file "
            "in its place if you trust the run, or remove the link. Nothing was written."
        )


def _model(earlier: EarlierRun, config: Config) -> Path | None:
    """The model to go on from, whole; where this run saved none, the one that it was continuing."""
    inherited = continued.earlier_model_of(config)
    places = [earlier.run_dir]
    if inherited:
        path = continued.resolved_path(inherited, earlier.run_dir, SERVER_SITE_NAME)
        places.append(_own_place("resume_from", path, earlier, SERVER_SITE_NAME))
    found = [model for place in places if (model := earlier_model(place / FOLDER))]
    if inherited and not found:
        raise ValueError(
            f"{earlier.run_dir}: the run continued {places[-1]}, and no model is left in either. Give the "
            "run that still has it."
        )
    if found:
        verify_files(found[0])
    return found[0] if found else None


def _own_place(argument: str, path: Path, earlier: EarlierRun, site: str) -> Path:
    """The folder that a run says it was continuing itself, if this tool put it there.

    A run from elsewhere may name any folder of this machine; what lies in it would go into the next job, and
    with a deployed one to its server.
    """
    place = path.resolve()
    if earlier.is_simulated:
        is_ours = place.name == site and place.parent.name.endswith(f"_{CARRIED}")
    else:
        is_ours = place == earlier.run_dir.resolve() / f"app_{SERVER_SITE_NAME}" / CARRIED
    if not is_ours or links_in(place):
        raise ValueError(
            f"{argument}: expected a folder that `nvflare-llm resume` made, found '{printable(path, 200)}' "
            "in the earlier job. If you trust the run, give the one that it was continuing. Nothing was "
            "written."
        )
    return place


def _rounds_left(
    earlier: EarlierRun, config: Config, model: Path | None, num_rounds: int | None, does_end: bool
) -> Rounds:
    told = [record.get("num_rounds") for record in read_lines(earlier.run_dir / ROUNDS_FILE)]
    recorded = num_rounds or next((count for count in reversed(told) if count), None)
    planned = continued.rounds_of(config, recorded)
    total = num_rounds or planned.first + planned.count
    first = int(read_manifest(model)["round"]) + 1 if model else planned.first
    if first >= total and not does_end:
        raise ValueError(
            f"{earlier.run_dir}: all {total} rounds are done. To go on, say how many the whole has "
            "(--rounds)."
        )
    return Rounds(first, max(0, total - first))


def _keep_beside(folder: Path, earlier: EarlierRun, config: Config, model: Path | None) -> list[str]:
    """Link the models and each site's state to where no simulator will wipe them; say what there was."""
    own = folder / SERVER_SITE_NAME
    _link_models(model, (MASTER, LAST, BEST), own)
    _link_state(SERVER_SITE_NAME, earlier, config, own)
    lines = []
    for site, run_dir in earlier.site_dirs.items():
        app = run_dir / f"app_{site}" / CLIENT_CONFIG
        kept = _link_state(site, earlier, read_config(app) if app.is_file() else {}, folder / site)
        lost = "optimizer, schedule and data order start afresh"
        lines.append(f"{site}: goes on with {', '.join(kept)}" if kept else f"{site}: {lost}")
    return lines


def _link_models(model: Path | None, names: Sequence[str], target: Path) -> None:
    for name in names:
        if model and (model.parent / name).is_dir():
            link_tree(model.parent / name, target / FOLDER / name)


def _link_state(site: str, earlier: EarlierRun, config: Config, target: Path) -> list[str]:
    """Link a simulated site's state; one that did not come so far has left it where it would have begun."""
    run_dir = earlier.run_dir if site == SERVER_SITE_NAME else earlier.site_dirs[site]
    before = continued.earlier_state_of(config).get("run_dir")
    places = [run_dir]
    if before:
        path = continued.resolved_path(str(before), run_dir, site)
        places.append(_own_place("run_dir of EarlierRunState", path, earlier, site))
    kept = []
    for name in STATE_FOLDERS:
        source = next((place / name for place in places if any((place / name).glob("*"))), None)
        if source:
            link_tree(source, target / name)
            kept.append(name)
    return kept


def _write_job(out: Path, beside: Path, earlier: EarlierRun, model: Path | None, rounds: Rounds) -> list[str]:
    meta = {**earlier.meta, "name": f"{earlier.meta.get('name', 'job').removesuffix('_resumed')}_resumed"}
    apps, lines = dict(earlier.apps), []
    server_app, resume_from = earlier.server_app, f"{beside}/{SERVER_SITE_NAME}"
    if not earlier.is_simulated:
        resume_from, lines = _ON_SERVER, _advice(earlier)
        if model:
            server_app = _apart(meta, apps, earlier, lines)
    for name, app in apps.items():
        shutil.copytree(app, out / name, ignore=shutil.ignore_patterns(CARRIED, *_SIGNATURES))
        _edit(
            out / name / SERVER_CONFIG, lambda config: _go_on(config, rounds, resume_from if model else None)
        )
        for file in (SERVER_CONFIG, CLIENT_CONFIG):
            _edit(out / name / file, lambda config: _take_state(config, earlier, beside))
    if model and not earlier.is_simulated:
        _link_models(model, (model.name, BEST), out / server_app / CARRIED)
    write_config(out / META, meta)
    return lines


def _go_on(config: Config, rounds: Rounds, resume_from: str | None) -> None:
    if config.get("workflows"):  # the other sites' apps may have an empty one
        continued.continue_server(config, rounds, resume_from)


def _take_state(config: Config, earlier: EarlierRun, beside: Path) -> None:
    if earlier.job_id is None:  # simulated
        continued.continue_state(config, {"run_dir": f"{beside}/{{SITE_NAME}}"})
    else:
        continued.continue_job_ids(config, earlier.job_id)


def _apart(meta: Config, apps: dict[str, Path], earlier: EarlierRun, lines: list[str]) -> str:
    """Give the server an app of its own, so that the model does not travel to every site; return its name."""
    name = earlier.server_app
    sites = deployment(meta)[name]
    others = earlier.sites if goes_to_all(sites) else [site for site in sites if site != SERVER_SITE_NAME]
    if not others and not goes_to_all(sites):
        return name
    if not others:
        lines.append("The model travels to every site, since the run does not tell which those were.")
        return name
    if goes_to_all(sites):
        lines.append(
            f"The earlier job went to all sites. So that the model goes to the server alone, this one names "
            f"those that took part: {', '.join(others)}. Others can be added to deploy_map in {META}."
        )
    own = f"{name}_{SERVER_SITE_NAME}"
    meta["deploy_map"] = {own: [SERVER_SITE_NAME], **meta["deploy_map"], name: others}
    apps[own] = apps[name]
    return own


def _advice(earlier: EarlierRun) -> list[str]:
    lines = [
        f"Sites look for their state of job {earlier.job_id} in their own workspace; each site's log says "
        "whether it was there. Where the server's run directory is gone, so is its filter state: its first "
        "broadcast is then a whole model."
    ]
    if earlier.study not in (None, "default"):
        lines.append(f"The earlier job was of study {earlier.study}: submit this one with --study, too.")
    return lines


def _sentence(model: Path | None, rounds: Rounds) -> str:
    if model is None:
        return f"No round was saved: the job starts again at round {rounds.first}, {rounds.count} rounds."
    metrics = read_manifest(model.parent / BEST).get("metrics", {})
    best = f" Best so far: {metrics}." if metrics else ""
    return f"Continues with round {rounds.first}, {rounds.count} to do, from {model}.{best}"


def write_config(file: Path, content: Config) -> None:
    """Write a job's file as JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _edit(file: Path, change: Callable[[Config], None]) -> None:
    if file.is_file():
        content = read_config(file)
        change(content)
        write_config(file, content)
