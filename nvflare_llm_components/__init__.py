"""Federated fine-tuning of large language models on NVIDIA FLARE, by JSON jobs alone.

The map of the package; an arrow is an import, and there are no others::

    floor 2   executors     filters         persistors  aggregators   adapters to NVFlare: thin
                  |             |               |
    floor 1   training/     quantization/   checkpoint/               pure: no NVFlare, not each other
    hall      cli, tools/, data/                                      for people; import floors 1 and 2

A job names the adapters by class path, so importing this package loads nothing heavy.
"""

__version__ = "0.1.0"
