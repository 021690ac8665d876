"""Federated fine-tuning of large language models on NVIDIA FLARE, by JSON jobs alone.

The map of the package; each floor imports downwards only, as the table in CONTRIBUTING.md says::

    floor 2   executors  filters  persistors  aggregators  workflows  widgets  server_model   thin
    front     flare/         what every adapter needs of FLARE: contexts, tasks, messages, memory
    gate      policy/        what a site or a server accepts of a job: pure
    floor 1   training/   quantization/   checkpoint/   averages       pure: no FLARE, not each other
    ground    tensors/       tensors, names, safetensors files, atomic folders: written once
    hall      cli/  recipes  tools/  jobs/  data/    for people; nobody outside the hall imports it

Where to start: :mod:`.components` lists what a job may name; each adapter's module says which part of the
floor below it drives, and each folder's docstring is a reading order. A job names the adapters by class path,
so importing this package loads nothing and changes nothing.
"""

__version__ = "0.1.0"
