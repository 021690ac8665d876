from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from nvflare_llm_components.checkpoint.manifest import verify_files
from nvflare_llm_components.checkpoint.model_card import model_card
from nvflare_llm_components.checkpoint.model_folder import save_model_folder

RECORD = {
    "round": 2,
    "job_id": "job-2",
    "earlier_jobs": ["job-1"],
    "base": {"name": "org/name", "revision": "abc", "weights_sha256": "0f" * 32},
    "update_norm": 1.5,
    "round_log": {"sites": {"site-1": {"weight": 30.0}, "site-2": {}}, "missing": ["site-3"]},
}


def test_the_hub_reads_its_metadata():
    card = ModelCard(model_card(RECORD, None))
    assert card.data.to_dict() == {
        "base_model": "org/name",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["federated-learning", "nvflare", "sft"],
    }


def test_an_adapter_names_its_base_and_kind():
    card = ModelCard(model_card(RECORD, {"peft_type": "LORA", "base_model_name_or_path": "org/base"}))
    assert (card.data.base_model, card.data.library_name) == ("org/base", "peft")
    assert "lora" in card.data.tags
    assert "A LORA adapter fine-tuned by a federation" in card.text


def test_people_read_where_it_comes_from():
    text = ModelCard(model_card(RECORD, None)).text
    for row in (
        "| Base model | org/name |",
        "| Rounds | 3 |",
        "| Jobs before it | job-1 |",
        "| Sites of the last round | site-1 (weight 30), site-2 |",
        "| Sites that were missing | site-3 |",
        "| Norm of the last update | 1.5 |",
    ):
        assert row in text


def test_people_read_how_it_is_asked():
    assert r'with "\n\nResponse:\n" behind the prompt' in model_card(RECORD, None)


def test_a_folder_of_the_server_is_no_base_model_of_the_hub():
    card = ModelCard(model_card({**RECORD, "base": {"name": "/secret/models/x"}}, None))
    assert card.data.to_dict().get("base_model") is None


@pytest.mark.parametrize("name", ['a"\nlicense: mit', "---\nx", "| <script>"])
def test_a_name_breaks_neither_metadata_nor_table(name: str):
    record = {**RECORD, "round_log": {"sites": {name: {}}}, "base": {"name": name}}
    card = ModelCard(model_card(record, {"peft_type": name, "base_model_name_or_path": name}))
    assert card.data.to_dict().get("license") is None
    assert "<script>" not in card.content
    assert card.content.count("\n---\n") == 1


def test_a_saved_folder_has_one_and_its_hash(tmp_path: Path):
    save_model_folder(tmp_path / "m", {"a": torch.ones(2)}, {}, RECORD)
    assert ModelCard.load(tmp_path / "m/README.md").data.base_model == "org/name"
    verify_files(tmp_path / "m")
