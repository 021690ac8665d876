"""What is looked at before a job runs, in seconds: each check is a function, each finding has its remedy.

Read in this order:

- :mod:`.subject`   What is checked, and what a check finds
- :mod:`.job`       Checks of a job's files alone: variables, classes, filters, agreement of both sides,
                    numbers of sites
- :mod:`.data`      Checks of what lies on this machine for each site: model folder, rows, template, steps of
                    a round
- :mod:`.machine`   Checks of the machine: what the workspace allows, what a message weighs, free disk and
                    memory
- :mod:`.check`     Looks at a job, its sites and this machine before anything runs: seconds instead of a
                    failed job
"""
