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


DOUBLING = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}]


def sequence(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": steps}


def template(num_pieces: int, num_ids: int) -> dict[str, Any]:
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * num_pieces
    special = {"id": "<s>", "ids": [1] * num_ids, "tokens": ["<s>"] * num_ids}
    return {"type": "TemplateProcessing", "single": pieces, "special_tokens": {"<s>": special}}


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
        ({"num_labels": 10**8}, "num_labels: expected a whole number from 0 to 65536"),
        ({"text_config": {"a": [{"num_labels": 10**8}]}}, "num_labels"),
        ({"attention_types": [[["global", "local"], 10**9]]}, "attention_types"),
        ({"num_mtp_layers": 2**40}, "num_mtp_layers"),
        ({"quantization_config": [1]}, "quantization_config: expected an object, found list"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: expected 'bitsandbytes'"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quant_method"),
    ],
)
def test_a_hostile_configuration_is_refused(values: dict[str, Any], words: str, folder: Path):
    change(folder / "config.json", **values)
    with pytest.raises(PolicyError, match=words):
        check_model_folder(folder, is_brought=False, is_trained=True)


@pytest.mark.parametrize(
    "values",
    [
        {"num_mtp_layers": 10**9},
        {"first_k_dense_replace": -(10**9)},
        {"lists": [[[1, 10**9]]]},
        {"text_config": {"anything": 10**9}},
    ],
)
def test_a_number_that_nobody_knows_is_small_where_a_job_brings_it(values: dict[str, Any], folder: Path):
    change(folder / "config.json", rope_theta=10**8, **values)
    check_model_folder(folder, is_brought=False, is_trained=False)
    with pytest.raises(PolicyError, match="expected at most 1,048,576, found"):
        check_model_folder(folder, is_brought=True, is_trained=False)


@pytest.mark.parametrize("place", ["../other/model.safetensors", "/etc/passwd", "..", "sub/a.safetensors", 5])
@pytest.mark.parametrize("is_trained", [True, False])
def test_an_index_names_files_beside_it_and_no_others(place: object, is_trained: bool, folder: Path):
    change(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": place})
    with pytest.raises(PolicyError, match=r"index\.json: weight_map: expected names of files beside it"):
        check_model_folder(folder, is_brought=False, is_trained=is_trained)


def test_an_honest_index_is_accepted(folder: Path):
    change(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": "model.safetensors"})
    check_model_folder(folder, is_brought=True, is_trained=True)


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
        ("tokenizer.json", {"normalizer": sequence(DOUBLING * 30)}, "at most 8"),
        ("tokenizer.json", {"normalizer": sequence(DOUBLING * 8)}, "at most 16 times"),
        ("tokenizer.json", {"normalizer": DOUBLING[0] | {"content": "a" * 10**6}}, "at most 64 characters"),
        ("tokenizer.json", {"normalizer": DOUBLING[0] | {"pattern": {"String": ""}}}, "at most 16 times"),
        ("tokenizer.json", {"normalizer": {"type": "Precompiled"}}, "normalizer: expected steps among"),
        ("tokenizer.json", {"pre_tokenizer": sequence([{"type": "ByteLevel"}] * 8)}, "ByteLevel once"),
        ("tokenizer.json", {"post_processor": template(10**5, 1)}, "at most 8"),
        ("tokenizer.json", {"post_processor": template(1, 10**5)}, "at most 8"),
        ("tokenizer.json", {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9}}, "1000"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a" * 10**4, 0.0]]}}, "256 characters"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a" * 10**4: 0}}}, "256 characters"),
        ("tokenizer.json", {"added_tokens": [{"content": f"<{n}>"} for n in range(2000)]}, "at most 1000"),
        ("added_tokens.json", {f"<{n}>": n for n in range(2000)}, "at most 1000"),
        ("special_tokens_map.json", {"additional_special_tokens": ["a"] * 2000}, "at most 1000"),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": {f"t{n}": "a" for n in range(2000)}},
            "at most 1000",
        ),
        ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "/etc/passwd"}}, "sp_model_kwargs"),
        ("tokenizer_config.json", {"special_tokens_map_file": "/etc/passwd"}, "special_tokens_map_file"),
        ("tokenizer_config.json", {"tokenizer_class": "XLMTokenizer"}, "tokenizer_class: expected"),
        ("tokenizer_config.json", {"tokenizer_class": None}, "tokenizer_class"),
        ("tokenizer_config.json", {"a": "b" * 2**21}, "at most 1,048,576 bytes"),
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
    check_model_folder(folder, is_brought=True, is_trained=False)  # and a server runs none


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_model_that_a_job_brings_holds_no_link(is_trained: bool, folder: Path):
    """A server saves what lies beside the weights with the global model."""
    (folder / "merges.txt").symlink_to("/etc/passwd")
    with pytest.raises(PolicyError, match=r"the link merges\.txt"):
        check_model_folder(folder, is_brought=True, is_trained=is_trained)


def test_a_model_is_no_larger_than_its_files(folder: Path):
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    check_borne_out(folder, 2 * held)
    with pytest.raises(PolicyError, match=r"expected sizes that its weights bear out, found a model of"):
        check_borne_out(folder, 2 * held + 1)
    check_borne_out(folder / "missing", 2**60)  # left to whoever opens it
