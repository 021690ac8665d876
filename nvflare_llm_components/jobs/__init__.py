"""A job as a folder: what one chooses of it, how it is written, and how FLARE reads it at a site.

Read in this order:

- :mod:`.read`       Reads a job folder as FLARE does on one site: variables and environment resolved
- :mod:`.choices`    What one chooses of a job: one field a choice, with default and sentence, for CLI, TOML
                     and docs
- :mod:`.validate`   Refuses choices that give no job, before one is written
- :mod:`.parts`      Components that more than one part of a job names
- :mod:`.server`     Choices to ``config_fed_server.json``. What is there for a reason is explained in
                     job_configs/README.md
- :mod:`.client`     Choices to ``config_fed_client.json``. What is there for a reason is explained in
                     job_configs/README.md
- :mod:`.layout`     JSON as people lay it out: what fits a line stands on one
- :mod:`.write`      Writes a job folder of choices, or the choices themselves as TOML with a comment on each
- :mod:`.shipped`    The shipped jobs as choices: what each folder of ``job_configs`` is made of
- :mod:`.fed_job`    Choices as a job of FLARE's Job API: what is added to it stands beside what they give
- :mod:`.api`        Jobs made by FLARE's Job API or a recipe, without a copy of this package in them
"""
