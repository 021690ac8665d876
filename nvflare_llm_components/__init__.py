"""Federated fine-tuning of large language models on NVIDIA FLARE, by JSON jobs alone.

The map of the package; an arrow is an import, and there are no others::

    floor 2   executors     filters         persistors  aggregators   adapters to NVFlare: thin
                  |             |               |
    floor 1   training/     quantization/   checkpoint/               pure: no NVFlare, not each other
    hall      cli, tools/, data/                                      for people; import floors 1 and 2

A job names the adapters by class path, so importing this package loads nothing heavy.
"""

import os

__version__ = "0.1.0"

# Torch reads both when it is loaded; whoever sets them decides. Threads that spin while they wait take the
# cores from the other sites of a machine (three times the wall of a round), and large pages spare the kernel
# most of its work on fresh tensors (a third of the time of a copy).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
