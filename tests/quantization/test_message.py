"""A whole state dict: its header, and that everything in it comes back."""

import zlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.quantization.message import decode_message, encode_message
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.quantization.wire import crc32_of


def test_golden_header():
    message = encode_message({"w": torch.zeros(2, 8), "n": torch.zeros(3)}, PrecisionPolicy("int8"))
    described = b'["w",{"block_size":128,"codec":"int8","dtype":"float32","num_nonfinite":0,"shape":[2,8]}]'
    payload = b"\x80\x00" + bytes(16)  # a scale of 2 ** -126
    assert message.header == {
        "version": 1,
        "precision": "int8",
        "params": {
            "w": {
                "codec": "int8",
                "dtype": "float32",
                "shape": [2, 8],
                "block_size": 128,
                "num_nonfinite": 0,
                "crc32": zlib.crc32(described + payload),
            },
            "n": {"codec": "raw", "dtype": "float32", "shape": [3], "crc32": 1130917961},
        },
    }


names = st.sampled_from(["a", "b.weight", "c/d", "ü"])
shapes = st.lists(st.integers(0, 9), max_size=3)
kinds = st.sampled_from(
    [
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8),
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.dictionaries(names, st.tuples(shapes, kinds), max_size=4),
    precision=st.sampled_from(["fp32", "fp16", "bf16", "int8", "nf4", "int2"]),
    lazy=st.booleans(),
)
def test_any_state_dict_comes_back_with_its_names_shapes_and_integers(tensors, precision, lazy):
    values = {name: torch.randn(shape).mul(3).to(kind) for name, (shape, kind) in tensors.items()}
    message = encode_message(values, PrecisionPolicy(precision, overrides={"c/d": "fp32"}))
    found = decode_message(message.values, message.header, None, lazy)[0]
    assert list(found) == list(values)
    for name, value in values.items():
        back = found[name].materialize() if lazy else found[name]
        assert back.shape == value.shape
        if value.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            assert torch.allclose(back.double(), value.double(), atol=9.0 if precision == "int2" else 2.0)
            assert back.dtype in (torch.float32, torch.float64)
        else:
            assert back.dtype == value.dtype
            assert crc32_of(back) == crc32_of(value)
