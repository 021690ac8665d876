import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvflare_llm_components.checkpoint.weight_files import ADAPTER_CONFIG, map_weights, write_weights
from nvflare_llm_components.tensors.errors import CheckpointError

WEIGHTS = {f"layer.{i}": torch.full((64,), float(i)) for i in range(5)}


def test_a_small_model_is_one_file(tmp_path: Path):
    digests = write_weights(tmp_path, WEIGHTS, "5GB", None)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors"} == set(digests)


def test_a_large_model_is_sharded_with_an_index(tmp_path: Path):
    digests = write_weights(tmp_path, WEIGHTS, 600, None)
    assert len(digests) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 256
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], WEIGHTS[name])
    read = map_weights(tmp_path)
    assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())


def test_a_folder_with_both_is_read_as_transformers_reads_it(tmp_path: Path):
    write_weights(tmp_path, WEIGHTS, 600, None)
    save_file({"layer.0": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(map_weights(tmp_path)) == {"layer.0"}


def test_shards_are_planned_in_the_dtype_on_disk(tmp_path: Path):
    assert len(write_weights(tmp_path, WEIGHTS, 5 * 128, torch.bfloat16)) == 1


def test_an_adapter_is_one_file_of_its_own_name(tmp_path: Path):
    (tmp_path / ADAPTER_CONFIG).write_text("{}")
    assert set(write_weights(tmp_path, WEIGHTS, 600, None)) == {"adapter_model.safetensors"}
    assert set(map_weights(tmp_path)) == set(WEIGHTS)


def test_a_missing_shard_is_named(tmp_path: Path):
    shard = sorted(write_weights(tmp_path, WEIGHTS, 600, None))[1]
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=shard):
        map_weights(tmp_path)


def test_a_shard_without_its_tensor_is_named(tmp_path: Path):
    shard = sorted(write_weights(tmp_path, WEIGHTS, 600, None))[0]
    save_file({"other": torch.ones(1)}, tmp_path / shard)
    with pytest.raises(CheckpointError, match=r"places \['layer.0', 'layer.1'\]"):
        map_weights(tmp_path)


def test_an_index_can_not_point_out_of_its_folder(tmp_path: Path):
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected shards beside the index"):
        map_weights(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: expected an index"):
        map_weights(tmp_path)


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        map_weights(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="found none of them"):
        map_weights(tmp_path)
