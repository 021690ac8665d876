"""What the commands do. :mod:`..cli` only reads the words of a command.

Read in this order:

- :mod:`.allow`             Adds our components to what a site lets jobs load: ``class_allow_list`` in
                            ``local/resources.json``
- :mod:`.line_settings`     What FLARE's streaming needs to hold on slow lines and through cuts: a kit's
                            ``comm_config.json``
- :mod:`.policy`            A site's own policy: writes the commented file, and says beforehand what a job
                            would be refused for
- :mod:`.checks`            What is looked at before a job runs, in seconds: each check is a function, each
                            finding has its remedy
- :mod:`.environment`       Variables that torch and glibc read when a process starts: set where the process
                            is ours to start
- :mod:`.quiet`             Keeps libraries from telling what people at a console did not ask
- :mod:`.shell`             Runs commands as a user types them: echoed, logged to a file, and failing loudly
- :mod:`.federation`        Runs one job in FLARE's simulator, and believes only what it leaves on disk
- :mod:`.run`               Runs a job in the simulator: checked, allowed, watched, and judged in the last
                            line
- :mod:`.view`              One live view of a run, from what server and sites write: round, loss, bytes, time
                            left, per site
- :mod:`.cause`             Why a run failed: the one line, among the logs of all its processes, that the
                            others follow from
- :mod:`.runs`              Finds and reads what a run left: the records of its sites
- :mod:`.plots`             Curves of federated runs and baselines, laid over each other by global step
- :mod:`.report`            One page of a run that needs nothing beside it: verdict, rounds, sites, messages
                            and curves as HTML
- :mod:`.traffic`           What a run sent and received: a table, a plot or JSON of the ledgers that the
                            filters keep
- :mod:`.sizes`             What one message and one round will cost, from a model's config alone
- :mod:`.memory`            Whether a model can be trained on a device: what one process of a site needs, by
                            sharding
- :mod:`.timeouts`          Whether a message gets through in the time that a job gives it: arithmetic, before
                            anything is run
- :mod:`.find_run`          Finds what an earlier run left, wherever it ran: its job, its models, its sites
- :mod:`.continued`         Edits a job's configuration so that it goes on from an earlier run
- :mod:`.resume`            Turns what a dead or finished run left into a job that continues it
- :mod:`.deployment`        A federation that is up, as an administrator's kit reaches it; it is connected to
                            anew after each break
- :mod:`.in_place`          Continues a job whose run directory still lies on the server, from anywhere:
                            nothing but JSON travels
- :mod:`.launch`            Submits a job to a federation and stays with it: where it is lost, it is
                            continued, to its end
- :mod:`.baseline`          Centralized training with the settings and the data of a federated job, to compare
                            with it
- :mod:`.generation`        What people do with a trained model: ask it, merge an adapter into its base, judge
                            it on held-out rows
- :mod:`.harness`           Tasks of EleutherAI's lm-evaluation-harness for a saved model, from files alone
- :mod:`.demo`              The whole way once: three sites, three jobs, a centralized run beside them, curves
                            and answers
- :mod:`.demo_pretrained`   The demo with a pretrained model: three sites' rows, LoRA, int8 messages, and
                            answers before and after
- :mod:`.demo_figure`       The demo's figure: what the federated model learns about each site's data, beside
                            the centralized one
"""
