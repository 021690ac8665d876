"""The gate: what a site or a server accepts of a job. Pure, used by the adapters and by the command line.

Read in this order:

- :mod:`.schema`        Allow-lists: one type with its range for each key that a job may set, and the sentence
                        that refuses
- :mod:`.training`      What a job may set of the training. Everything else is refused, also what later
                        releases may bring
- :mod:`.adapters`      What a job may set of an adapter: the kinds of PEFT, and their settings with ranges
- :mod:`.site`          The site's own policy: a file in the kit's ``local`` folder that no job can override
- :mod:`.limits`        What a job may take of a machine: its model's memory, processes, and disk that must
                        stay free
- :mod:`.places`        Where a job's files may lie: resolved, symlinks followed, below what the site itself
                        names
- :mod:`.model_files`   What a model's folder may hold: sizes that its files bear out, and weights that lie in
                        it
- :mod:`.brought`       What a model that a job brings may hold beside its weights: data alone, of a bounded
                        effect
- :mod:`.json_file`     JSON that came from outside: bounded, and an object
- :mod:`.job`           One job at one site: what it asks for, held against the package's allow-lists and the
                        site's policy
- :mod:`.results`       What a server accepts of a site's result: pure checks, before anything of it is
                        averaged
"""
