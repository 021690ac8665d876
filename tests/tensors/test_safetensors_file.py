import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.lazy import BLOCK_LENGTH, Deferred
from nvflare_llm_components.tensors.safetensors_file import DTYPE_NAMES, map_tensor_file, write_tensor_file

shapes = st.lists(st.integers(0, 5), max_size=3)
tensors = st.dictionaries(
    st.text("abc.0_", min_size=1, max_size=8),
    st.tuples(shapes, st.sampled_from(list(DTYPE_NAMES))),
    max_size=5,
)


@given(tensors)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_what_is_written_is_what_safetensors_reads(tmp_path: Path, specs):
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    values = {
        name: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for name, (shape, dtype) in specs.items()
    }
    digest = write_tensor_file(path, values)
    stock, ours = load_file(path), map_tensor_file(path)
    assert set(stock) == set(ours) == set(values)
    for name, value in values.items():
        for read in (stock[name], ours[name]):
            assert read.dtype == value.dtype
            assert torch.equal(read.float(), value.float())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_transposed_views_are_written_by_value(tmp_path: Path):
    value = torch.arange(6.0).reshape(2, 3).t()
    write_tensor_file(tmp_path / "x.safetensors", {"a": value})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], value)


def test_dtype_converts_floats_and_leaves_integers(tmp_path: Path):
    write_tensor_file(
        tmp_path / "x.safetensors", {"a": torch.tensor([1.5]), "n": torch.tensor([7])}, torch.bfloat16
    )
    read = map_tensor_file(tmp_path / "x.safetensors")
    assert (read["a"].dtype, read["n"].dtype) == (torch.bfloat16, torch.int64)
    assert read["a"].item() == 1.5


def test_a_mapped_tensor_can_be_changed_and_the_file_stays(tmp_path: Path):
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    map_tensor_file(tmp_path / "x.safetensors")["a"].zero_()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(4))


@pytest.mark.parametrize("length", [0, 4, 20, -1])
def test_a_truncated_file_is_named(tmp_path: Path, length: int):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a complete safetensors file"):
        map_tensor_file(path)


def test_an_unknown_dtype_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="phase: expected a dtype"):
        write_tensor_file(tmp_path / "x.safetensors", {"phase": torch.ones(2, dtype=torch.complex128)})


def test_a_tensor_can_not_take_the_place_of_the_headers_metadata(tmp_path: Path):
    with pytest.raises(CheckpointError, match="__metadata__: expected a tensor's name"):
        write_tensor_file(tmp_path / "x.safetensors", {"__metadata__": torch.ones(2)})
    assert not list(tmp_path.iterdir())


def test_every_mapped_tensor_is_aligned_to_its_own_item_size(tmp_path: Path):
    values = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(1, dtype=torch.float16)}
    values |= {"c": torch.ones(1), "d": torch.ones(1, dtype=torch.float64)}
    write_tensor_file(tmp_path / "x.safetensors", values)
    for value in map_tensor_file(tmp_path / "x.safetensors").values():
        assert value.data_ptr() % value.element_size() == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_blocks_that_are_made_in_the_place_of_the_one_before_arrive(tmp_path, dtype):
    expected = torch.arange(9 * BLOCK_LENGTH + 5, dtype=torch.float32)
    seen = []

    def blocks():
        buffer = torch.empty(BLOCK_LENGTH)
        for block in expected.split(BLOCK_LENGTH):
            yield buffer[: block.numel()].copy_(block)
            buffer.fill_(-1)

    value = Deferred(blocks, expected.shape, torch.float32)
    file = tmp_path / "x.safetensors"
    write_tensor_file(file, {"a": value}, dtype, see=lambda name, start, block: seen.append((name, start)))
    assert torch.equal(map_tensor_file(file)["a"], expected.to(dtype or torch.float32))
    assert seen == [("a", BLOCK_LENGTH * number) for number in range(10)]
