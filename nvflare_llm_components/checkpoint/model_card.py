"""A saved model's README.md, with the metadata that the Hugging Face hub reads."""

import json
from collections.abc import Mapping
from typing import Any

from nvflare_llm_components.tensors.hub import HUB_NAME
from nvflare_llm_components.tensors.text import ANSWER_CUE, printable

CARD_FILE = "README.md"
ASK = "`nvflare-llm generate` does the second, and with `--chat` the first."
_TAGS = ["federated-learning", "nvflare", "sft"]


def model_card(record: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> str:
    """The card of a model that a federation trained.

    Args:
        record: what its federation.json says.
        adapter: its adapter_config.json; None for a whole model.
    """
    base = record.get("base") or {}
    source = adapter.get("base_model_name_or_path") if adapter else base.get("name")
    return f"---\n{_metadata(source, adapter)}---\n\n{_text(record, base, source, adapter)}"


def _metadata(source: Any, adapter: Mapping[str, Any] | None) -> str:
    kind = str(adapter.get("peft_type", "")).lower() if adapter else ""
    fields: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*_TAGS, *([kind] if kind.isidentifier() else [])],
    }
    # A folder of the server's is nobody's business.
    if isinstance(source, str) and HUB_NAME.fullmatch(source):
        fields = {"base_model": source, "base_model_relation": "adapter" if adapter else "finetune"} | fields
    # JSON is YAML, and its quotes hold whatever a name may hold.
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items())


def _text(
    record: Mapping[str, Any], base: Mapping[str, Any], source: Any, adapter: Mapping[str, Any] | None
) -> str:
    told = record.get("round_log") or {}
    names = (record.get("parents") or {}).get("sites", [])
    sites = told.get("sites") or {name: {} for name in names}
    rows = [
        ("Base model", source),
        ("Its revision", base.get("revision")),
        ("SHA-256 of its weights", base.get("weights_sha256")),
        ("Rounds", record["round"] + 1 if "round" in record else None),
        ("Job", record.get("job_id")),
        ("Jobs before it", ", ".join(record.get("earlier_jobs", []))),
        ("Sites of the last round", ", ".join(_site(name, facts) for name, facts in sites.items())),
        ("Sites that were missing", ", ".join(told.get("missing", []))),
        ("Norm of the last update", record.get("update_norm")),
    ]
    table = "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows if value not in (None, ""))
    kind = f"{adapter.get('peft_type', 'PEFT')} adapter" if adapter else "model"
    return (
        f"# A {_cell(kind)} fine-tuned by a federation\n\n"
        "Trained with [NVIDIA FLARE](https://github.com/NVIDIA/NVFlare) and `nvflare-llm-components`: the "
        "sites' data stayed where they were, weights alone travelled.\n\n"
        f"| | |\n|---|---|\n{table}\n"
        "Ask it as it was trained: where the rows were messages, by the chat template; where they were input "
        f"and output, with {json.dumps(ANSWER_CUE)} behind the prompt; otherwise with the prompt alone. "
        f"{ASK}\n\n"
        "`federation.json` has the whole chain from the base to this folder, round by round, with the hash "
        "of each round's weights (`sha256sum *.safetensors | sha256sum`) and of each file here.\n"
    )


def _site(name: str, facts: Mapping[str, Any]) -> str:
    weight = facts.get("weight")
    return name if weight is None else f"{name} (weight {weight:g})"


def _cell(value: object) -> str:
    return printable(value, 2000).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
