"""The ``nvflare-llm`` command: a thin Typer shell over :mod:`nvflare_llm_components.tools`.

Read in this order:

- :mod:`.app`        The Typer application, and what its commands share
- :mod:`.commands`   Commands for sites, and for what came of a run
- :mod:`.data`       Commands that make rows for sites
- :mod:`.job`        The command that writes jobs. Its options are the fields of the choices: stated once,
                     there
- :mod:`.run`        Commands that look at a job, run it, and watch it
- :mod:`.models`     Commands for a trained model: ask it, merge it, judge it
- :mod:`.policy`     The commands of a site's own policy
- :mod:`.node`       The command of a site's further machines

Commands import what they call inside their function: ``nvflare-llm --help`` then needs no torch. A module
here is imported for the commands that it adds to :data:`app`.
"""

from nvflare_llm_components.cli import commands, data, job, models, node, policy, run
from nvflare_llm_components.cli.app import app

__all__ = ["app", "commands", "data", "job", "models", "node", "policy", "run"]
