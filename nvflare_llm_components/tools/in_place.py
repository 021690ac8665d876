"""Continues a job whose run directory still lies on the server, from anywhere: nothing but JSON travels."""

import shutil
from pathlib import Path

from nvflare_llm_components.tools import continued
from nvflare_llm_components.tools.continued import Config, Rounds
from nvflare_llm_components.tools.find_run import META, read_config
from nvflare_llm_components.tools.resume import CARRIED, CLIENT_CONFIG, SERVER_CONFIG, write_config


def continue_in_place(job: Path, out: Path, job_id: str, saved_round: int | None) -> str:
    """Write the job that goes on from the run directory that a job has left on the server.

    Server and sites look for it in their own workspaces, by its id, and give it to the same submitter only.

    Args:
        job: folder of the job as it was submitted.
        out: the new job's folder; replaced.
        job_id: of the job that is continued.
        saved_round: the latest round whose model lies in its run directory; None where it saved none: then
            the new job begins where this one began.

    Returns:
        What the new job does, in a sentence.

    Raises:
        ValueError: the job can't begin in the middle.
    """
    shutil.rmtree(out, ignore_errors=True)
    carried = () if saved_round is None else (CARRIED,)
    shutil.copytree(job, out, ignore=shutil.ignore_patterns(*carried))
    sentence = f"No round of job {job_id} was saved: it begins again where it began."
    for app in sorted(path.parents[1] for path in out.glob(f"*/{CLIENT_CONFIG}")):
        for file in (app / SERVER_CONFIG, app / CLIENT_CONFIG):
            config = read_config(file) if file.is_file() else {}
            if saved_round is not None and config.get("workflows"):
                rounds = _rounds_after(saved_round, config)
                continued.continue_server(config, rounds, f"{{WORKSPACE}}/{job_id}")
                sentence = f"Continues job {job_id} with round {rounds.first + 1}, {rounds.count} to do."
            if config:
                continued.continue_job_ids(config, job_id)
                write_config(file, config)
    name = read_config(out / META).get("name", "job").removesuffix("_resumed")
    write_config(out / META, {**read_config(out / META), "name": f"{name}_resumed"})
    return sentence


def _rounds_after(saved_round: int, config: Config) -> Rounds:
    """The rounds still to do; none where the server was lost in what comes after the last one."""
    planned = continued.rounds_of(config)
    first = saved_round + 1
    return Rounds(first, max(0, planned.first + planned.count - first))
