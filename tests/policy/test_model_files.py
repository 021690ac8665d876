"""Folders of models that ask for too much, or bring a program."""

import json
from pathlib import Path
from typing import Any

import pytest

from nvflare_llm_components.policy.model_files import check_borne_out, check_model_folder
from nvflare_llm_components.policy.schema import PolicyError
from tests.tiny import save_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def test_an_honest_folder_is_accepted(folder: Path):
    check_model_folder(folder, is_brought=False, is_trained=True)
    check_model_folder(folder, is_brought=True, is_trained=False)
    check_model_folder(folder / "missing", is_brought=True, is_trained=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected a whole number from 0 to 1024"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": "9" * 1000}, "num_hidden_layers"),
        ({"vocab_size": 10**9}, "vocab_size: expected"),
        ({"vocab_size": 10**6}, "vocab_size x width"),
        ({"hidden_size": 10**7}, "hidden_size"),
        ({"hidden_size": 10**5}, "width"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers"),
        ({"num_local_experts": 10**6}, "num_local_experts"),
        ({"n_positions": 10**6}, "n_positions"),
        ({"attn_implementation": "org/kernel"}, "could download a kernel"),
        ({"attn_implementation": {"": "org/kernel"}}, "could download a kernel"),
        ({"_attn_implementation": "org/kernel"}, "could download a kernel"),
        ({"text_config": {"attn_implementation": "org/kernel"}}, "could download a kernel"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: expected 'bitsandbytes'"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quant_method"),
    ],
)
def test_a_hostile_configuration_is_refused(values: dict[str, Any], words: str, folder: Path):
    change(folder / "config.json", **values)
    with pytest.raises(PolicyError, match=words):
        check_model_folder(folder, is_brought=False, is_trained=True)


def test_an_adapter_may_not_choose_the_model_to_load(folder: Path):
    change(folder / "adapter_config.json", base_model_name_or_path="/models/private")
    with pytest.raises(PolicyError, match="its configuration would choose the model to load"):
        check_model_folder(folder, is_brought=False, is_trained=True)
    check_model_folder(folder, is_brought=False, is_trained=False)  # the server reads no base


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("modeling_evil.py", {}, "modeling_evil.py"),
        ("chat_template.jinja", {}, "chat_template.jinja"),
        ("pytorch_model.bin", {}, "pytorch_model.bin"),
        ("additional_chat_templates/a.jinja", {}, "additional_chat_templates"),
        (
            "tokenizer_config.json",
            {"chat_template": "{% for a in range(10**9) %}{% endfor %}"},
            "chat_template",
        ),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "vocab_file"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "evil.T"}}, "auto_map"),
        (
            "tokenizer.json",
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}},
            "regular expression",
        ),
        ("tokenizer.json", {"normalizer": {"n": [{"pattern": {"Regex": "(a|a)*b"}}]}}, "regular expression"),
    ],
)
def test_a_model_that_a_job_brings_holds_no_program(
    file: str, values: dict[str, Any], words: str, folder: Path
):
    (folder / file).parent.mkdir(exist_ok=True)
    change(folder / file, **values)
    with pytest.raises(PolicyError, match=words):
        check_model_folder(folder, is_brought=True, is_trained=True)
    check_model_folder(folder, is_brought=False, is_trained=True)  # the site's own may


def test_a_model_that_a_job_brings_holds_no_link(folder: Path):
    (folder / "merges.txt").symlink_to("/etc/passwd")
    with pytest.raises(PolicyError, match=r"merges\.txt"):
        check_model_folder(folder, is_brought=True, is_trained=True)


def test_a_model_is_no_larger_than_its_files(folder: Path):
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    check_borne_out(folder, 2 * held)
    with pytest.raises(PolicyError, match=r"expected sizes that its weights bear out, found a model of"):
        check_borne_out(folder, 2 * held + 1)
    check_borne_out(folder / "missing", 2**60)
