"""Writes docs/adapters.md from a run: ``python -m tests.families.adapter_table docs/adapters.md``."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from nvflare_llm_components.tensors.errors import CheckpointError
from tests.families.adapter_run import base_model, run_kind
from tests.families.adapters import REFUSED, WORKING
from tests.families.federation import Server

HEAD = """# Kinds of adapters

Every kind is set by JSON alone, with the same `peft_config` in the executor and in the persistor.
This page is written by `python -m tests.families.adapter_table docs/adapters.md`, which sends each kind
through a federation: two sites, two rounds, a tiny Llama with 2 layers of width 32. A kind stands in the
first table where

- server and sites agree on its names, and the model in use at a site is the global model that it loaded,
- a site that is restarted after each round goes on to the same bits, and a job that is resumed starts from
  the bits of the server's last model,
- a message at int8 and at nf4 arrives with its names, shapes and dtypes, and finite,
- the saved folder opens with `AutoPeftModelForCausalLM` and gives the logits of the live model (to 1e-5:
  PiSSA and OLoRA split the base again when they are opened).

Where initial values depend on the base model, the server reads it once, before the first round, and lets go
of it. Large tensors that are never trained and that PEFT makes again from a seed are neither sent nor saved,
unless `save_projection` is set. Left out below: `"r": 4`, `"lora_alpha": 8` and
`"target_modules": ["q_proj", "v_proj"]`.

## Working

| kind | peft_config | bytes of a message | at int8 | at nf4 |
|---|---|---|---|---|
"""
REFUSALS = """
## Refused, with the reason

| kind | peft_config | what the error says |
|---|---|---|
"""


def row(name: str, settings: dict[str, Any], base: Path, folder: Path) -> str:
    """A working kind's line; raises where it does not work."""
    outcome = run_kind(settings, base, folder)
    return f"| {name} | {_json(settings)} | {outcome.fp32} | {outcome.int8} | {outcome.nf4} |"


def refusal(name: str, settings: dict[str, Any], base: Path, folder: Path) -> str:
    """A refused kind's line."""
    try:
        Server.start(folder, model_name_or_path=str(base), peft_config=settings)
    except CheckpointError as error:
        return f"| {name} | {_json(settings)} | {str(error).removeprefix('peft_config: ')} |"
    raise AssertionError(f"{name} was not refused")


def _json(settings: dict[str, Any]) -> str:
    """The settings that tell this kind from others, as they stand in a job."""
    common = (("r", 4), ("lora_alpha", 8), ("target_modules", ["q_proj", "v_proj"]))
    shown = {key: value for key, value in settings.items() if (key, value) not in common}
    return f"`{json.dumps(shown)[1:-1]}`"


def main(target: Path) -> None:
    """Run all kinds; write the page."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NVFLARE_LLM_MODEL"] = folder  # what this site lets jobs use
        base = base_model(Path(folder, "base"))
        rows = [row(name, kind, base, Path(folder, name)) for name, kind in WORKING.items()]
        refusals = [refusal(name, kind, base, Path(folder, name)) for name, (kind, _) in REFUSED.items()]
    target.write_text(HEAD + "\n".join(rows) + "\n" + REFUSALS + "\n".join(refusals) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
