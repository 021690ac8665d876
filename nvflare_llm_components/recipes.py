"""The recipe: a job of choices for those who write FLARE's recipes in Python."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvflare.recipe.poc_env import PocEnv
from nvflare.recipe.run import Run
from nvflare.recipe.sim_env import SimEnv
from nvflare.recipe.spec import ExecEnv, Recipe

from nvflare_llm_components.jobs.choices import JobChoices
from nvflare_llm_components.jobs.fed_job import ChosenJob
from nvflare_llm_components.jobs.validate import checked
from nvflare_llm_components.jobs.write import chosen
from nvflare_llm_components.tools.allow import allow
from nvflare_llm_components.tools.federation import judge

_SERVER_OPTIMIZER = "torch.optim.SGD"


class HFSFTRecipe(Recipe):
    """Federated fine-tuning of a language model, by the choices that ``nvflare-llm job`` takes.

    It exports the same JSON, and no code: sites have this package. What is added by FLARE's own methods
    (``add_client_config``, ``enable_log_streaming``, filters, trackers) stands beside it in the export.

    Args:
        start: where the choices start: a shipped job, or a ``.toml`` file of choices.
        name: of the job.
        also_allow: further classes, by exact path, that SimEnv and PocEnv let the job load: those of
            components that are added.
        **choices: each by its name in :class:`~nvflare_llm_components.jobs.choices.JobChoices`; ``sites``
            may be a number or a list of names.

    Raises:
        ValueError: there is no such start or choice, or a choice is out of its range.
        OSError: the file of choices can't be read.
    """

    def __init__(
        self,
        start: str = "sft",
        *,
        name: str = "hf_sft",
        also_allow: Sequence[str] = (),
        **choices: Any,
    ) -> None:
        sites = choices.get("sites")
        if isinstance(sites, list | tuple):
            choices["sites"] = ",".join(sites)
        self.also_allow = tuple(also_allow)
        super().__init__(ChosenJob(name, chosen(start, choices)))

    @property
    def choices(self) -> JobChoices:
        """All that is chosen."""
        found: JobChoices = self._job.job.choices
        return found

    def process_env(self, env: ExecEnv) -> None:
        """Readies an environment on this machine: our classes are allowed in it, and model and data named.

        What FLARE makes anew is readied when it takes the job, and a deployment (``ProdEnv``) is left as its
        administrators have set it up.

        Raises:
            ValueError: the environment lacks sites that the job counts on.
        """
        if not isinstance(env, SimEnv | PocEnv):
            return
        self._check_sites(env)
        folder = Path(env.workspace_root, self.name) if isinstance(env, SimEnv) else Path(env.poc_workspace)
        also = [*self.also_allow, *[_SERVER_OPTIMIZER] * (self.choices.workflow == "fedopt")]
        self._job.job.before_writing = lambda: allow(folder, also, new=isinstance(env, SimEnv))
        places = {"NVFLARE_LLM_MODEL": self.choices.model, "NVFLARE_LLM_DATA": self.choices.data}
        for variable, value in places.items():
            if "{" not in value:
                os.environ.setdefault(variable, value)

    def run(self, env: ExecEnv, server_exec_params: Any = None, client_exec_params: Any = None) -> Run:
        """Runs the job as FLARE does, and in the simulator looks at what came of it.

        Returns:
            FLARE's handle of the run.

        Raises:
            CommandError: a simulated job failed, which FLARE's exit code doesn't tell; the last line is the
                cause.
            ValueError: the environment lacks sites that the job counts on.
        """
        run = super().run(env, server_exec_params, client_exec_params)
        if isinstance(env, SimEnv):
            judge(Path(env.workspace_root, self.name), self.choices.site_names, self.choices.rounds)
        return run

    def _prepare_client_apps(self) -> None:
        self._job.add_sites()

    def _apply_per_site_config(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        own = {**self.choices.per_site, **{site: dict(each) for site, each in config.items() if each}}
        self._job.job.choices = checked(replace(self.choices, per_site=own))

    def _check_sites(self, env: Any) -> None:
        names = env.clients or [f"site-{number}" for number in range(1, env.num_clients + 1)]
        needed = self.choices.site_names
        is_counted = env.clients is None and isinstance(env, SimEnv) and self.choices.per_site
        if is_counted or not set(needed) <= set(names):
            found = f"num_clients={env.num_clients}" if env.clients is None else f"clients={env.clients}"
            raise ValueError(
                f"{type(env).__name__}: expected the sites of the job, clients={needed}, "
                f"num_clients={len(needed)}. Found {found}. "
                "Name them there, or choose others with `sites`."
            )
