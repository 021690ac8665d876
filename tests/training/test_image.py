"""An image in memory is a safetensors file that another process maps; it lives as long as it is mapped."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from nvflare_llm_components.tensors.safetensors_file import map_tensor_file
from nvflare_llm_components.training.image import TensorImage

VALUES = {
    "a": torch.arange(6.0).reshape(2, 3).t(),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2], dtype=torch.int8),
    "scalar": torch.tensor(2.0, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
}


def image_of(values: dict[str, torch.Tensor]) -> TensorImage:
    names = sorted(values, key=lambda name: -values[name].dtype.itemsize)
    layout = {name: (values[name].shape, values[name].dtype) for name in names}
    return TensorImage(layout, ((name, values[name]) for name in names))


def test_an_image_is_a_safetensors_file_that_outlives_its_writer():
    image = image_of(VALUES)
    found = map_tensor_file(Path(image.path))
    image.close()
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_a_second_image_leaves_what_was_mapped_of_the_first():
    first = image_of({"a": torch.zeros(1000)})
    mapped = map_tensor_file(Path(first.path))
    first.close()
    second = image_of({"a": torch.ones(1000)})
    assert not mapped["a"].any()
    second.close()


def test_another_process_of_this_user_reads_it():
    image = image_of(VALUES)
    code = "import sys; print(len(open(sys.argv[1], 'rb').read()))"
    found = subprocess.run(
        [sys.executable, "-c", code, image.path], check=True, capture_output=True, text=True, timeout=60
    )
    image.close()
    assert int(found.stdout) >= len(save({name: value.contiguous() for name, value in VALUES.items()}))


def test_nothing_is_left_open_where_a_value_fails():
    def broken():
        yield "a", torch.zeros(2)
        raise ValueError("not finite")

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ValueError, match="not finite"):
        TensorImage({"a": ((2,), torch.float32), "b": ((2,), torch.float32)}, broken())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
