import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvflare_llm_components.checkpoint.initial_model import load_initial_model
from nvflare_llm_components.checkpoint.model_folder import save_model_folder
from tests.checkpoint.tiny_models import save_tiny_llama, state_of

GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight or not model.config.tie_word_embeddings
    asked = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    print(model.dtype, model.generate(asked, max_new_tokens=8, do_sample=False).tolist())
"""


def generated(*folders: Path) -> list[str]:
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GENERATE, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.splitlines()


@pytest.mark.parametrize(("tied", "max_shard_size"), [(True, "5GB"), (False, 20_000)])
def test_stock_transformers_generates_the_same_in_a_separate_process(
    tmp_path: Path, tied: bool, max_shard_size: int | str
):
    save_tiny_llama(tmp_path / "source", tied=tied)
    start = load_initial_model(str(tmp_path / "source"), None, 0)
    save_model_folder(tmp_path / "last", start.weights, start.companions, {"round": 0}, max_shard_size)
    assert (tmp_path / "last/model.safetensors.index.json").exists() is (max_shard_size != "5GB")
    last, source = generated(tmp_path / "last", tmp_path / "source")
    assert last == source


def test_the_record_says_what_was_saved(tmp_path: Path):
    save_tiny_llama(tmp_path / "source")
    start = load_initial_model(str(tmp_path / "source"), None, 0)
    save_model_folder(tmp_path / "last", start.weights, start.companions, {"round": 3, "job_id": "j"})
    record = json.loads((tmp_path / "last/federation.json").read_text())
    assert (record["format_version"], record["round"], record["job_id"]) == (1, 3, "j")
    assert record["precision"] == "float32"
    assert "torch" in record["packages"]
    files = {path.name for path in (tmp_path / "last").iterdir()} - {"federation.json"}
    assert set(record["sha256"]) == files
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((tmp_path / "last" / name).read_bytes()).hexdigest() == digest


def test_the_config_names_the_dtype_on_disk(tmp_path: Path):
    model = save_tiny_llama(tmp_path / "source")
    start = load_initial_model(str(tmp_path / "source"), None, 0)
    save_model_folder(tmp_path / "last", start.weights, start.companions, {}, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "last/config.json").read_text())["dtype"] == "bfloat16"
    saved = load_initial_model(str(tmp_path / "last"), None, 0).weights
    assert all(torch.equal(saved[name], value.bfloat16()) for name, value in state_of(model).items())


def test_saving_over_the_files_that_the_weights_are_mapped_from(tmp_path: Path):
    save_tiny_llama(tmp_path / "last")
    for _ in range(3):
        start = load_initial_model(str(tmp_path / "last"), None, 0)
        before = {name: value.clone() for name, value in start.weights.items()}
        save_model_folder(tmp_path / "last", start.weights, start.companions, {})
        after = load_initial_model(str(tmp_path / "last"), None, 0).weights
        assert all(torch.equal(after[name], value) for name, value in before.items())
