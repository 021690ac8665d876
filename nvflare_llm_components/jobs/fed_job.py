"""Choices as a job of FLARE's Job API: what is added to it stands beside what they give."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.job_config.api import FedJob
from nvflare.job_config.fed_job_config import FedJobConfig

from nvflare_llm_components.jobs.choices import JobChoices
from nvflare_llm_components.jobs.client import client_config
from nvflare_llm_components.jobs.layout import layout
from nvflare_llm_components.jobs.parts import Json
from nvflare_llm_components.jobs.server import server_config

_FORMAT = {"format_version": 2}  # FLARE makes an app for a target that gets something


class ChosenJob(FedJob):
    """A ``FedJob`` that exports what ``nvflare-llm job`` writes of the same choices.

    Components can't be handed to FLARE as objects, since a job's variables (``{num_clients}``) stand for
    their arguments: FLARE writes what a user adds, and the choices' configuration is put before it.
    """

    def __init__(self, name: str, choices: JobChoices) -> None:
        super().__init__(name=name, min_clients=choices.quorum or len(choices.site_names))
        self.job: ChosenJobConfig = ChosenJobConfig(name, choices)
        self.to_server(_FORMAT)

    def add_sites(self) -> None:
        """Gives each site its app: one for all, unless some have settings of their own."""
        choices = self.job.choices
        for site in choices.site_names if choices.per_site else ["@ALL"]:
            self.to(_FORMAT, site)


class ChosenJobConfig(FedJobConfig):
    """Writes the folder of a :class:`ChosenJob`.

    Attributes:
        choices: what the job is made of.
        before_writing: called whenever FLARE is about to take the job.
    """

    def __init__(self, name: str, choices: JobChoices) -> None:
        super().__init__(job_name=name, min_clients=choices.quorum or len(choices.site_names))
        self.set_app_packages(["nvflare_llm_components"])
        self.choices = choices
        self.before_writing: Callable[[], object] = lambda: None

    def generate_job_config(self, job_root: str) -> None:
        """Writes the job's folder below ``job_root``; FLARE calls it to export, to simulate and to submit."""
        self.before_writing()
        super().generate_job_config(job_root)
        folder = Path(job_root) / self.job_name
        for file in folder.glob("*/config/config_fed_*.json"):
            _rewrite(file, partial(_with, self._ours(file)))
        beside_server = folder / "app_server" / "config" / "config_fed_client.json"
        if beside_server.parent.is_dir():  # the server's gate reads there what sites are told to send
            beside_server.write_text(layout(client_config(self.choices)) + "\n", encoding="utf-8")
        _rewrite(folder / "meta.json", _without_empty)

    def _ours(self, file: Path) -> Json:
        if file.name == "config_fed_server.json":
            return server_config(self.choices)
        app = file.parents[1].name
        return client_config(self.choices, None if app == "app" else app.removeprefix("app_"))


def _rewrite(file: Path, change: Callable[[Json], Json]) -> None:
    content = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(layout(content) + "\n", encoding="utf-8")


def _without_empty(meta: Json) -> Json:
    return {key: value for key, value in meta.items() if value != {}}


def _with(ours: Json, added: Json) -> Json:
    """Our configuration, and what was added: to lists at their end, values in place of ours."""
    found: dict[str, Any] = dict(ours)
    for key, value in added.items():
        if isinstance(value, list):
            if value:
                found[key] = [*ours.get(key, []), *value]
        else:
            found[key] = value
    return found
