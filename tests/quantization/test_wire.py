"""The wire format: pinned bytes, and refusal of whatever does not keep to it."""

import copy
import math
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.quantization.arrays import as_tensor
from nvflare_llm_components.quantization.message import (
    Message,
    decode_message,
    encode_message,
)
from nvflare_llm_components.quantization.policy import PrecisionPolicy
from nvflare_llm_components.quantization.wire import WireFormatError, crc32_of, sealed

GOLDEN_WEIGHTS = [0.0, 1.0, -1.0, 0.5, -0.25, 0.1, math.inf, 1e-3, 3.0]
GOLDEN = {
    "fp16": ("0000003c00bc003800b4662e007c19140042", 0),
    "bf16": ("0000803f80bf003f80becd3d807f833a4040", 0),
    "int8": ("06000000000000000000807fc23c002ad615f50400007f", 1),
    "nf4": ("06000000000000000000807f3eff3f38ffb79476777f", 1),
}


def encoded(precision: str, weights: torch.Tensor, **policy) -> Message:
    return encode_message({"w": weights}, PrecisionPolicy(precision, **policy))


def messages() -> Message:
    weights = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    weights[3, 4] = math.nan
    values = {"a": weights, "b": weights[:3] * 1e-3, "norm": torch.ones(7), "steps": torch.tensor(3)}
    return encode_message(values, PrecisionPolicy("int8", overrides={"b": "nf4"}))


def decode(message: Message, header=None, values=None) -> dict:
    return decode_message(values or message.values, header or message.header, None, lazy=False)[0]


def resealed(name: str, entry: dict, payload: torch.Tensor) -> dict:
    """An entry that lies, with a checksum that doesn't."""
    return sealed(name, entry, payload)


LIES = {
    "unknown codec": ({"codec": "int3"}, "codec should be one of raw, fp16, bf16, int8, nf4. Found 'int3'"),
    "codec of another kind": ({"codec": ["int8"]}, "codec should be one of"),
    "other codec": ({"codec": "nf4"}, "payload should be uint8"),
    "unknown dtype": ({"dtype": "float31"}, "dtype should be a 16 to 64 bit float. Found 'float31'"),
    "integer dtype": ({"dtype": "int64"}, "dtype should be"),
    "more weights": ({"shape": [41, 40]}, "payload should be uint8"),
    "fewer weights": ({"shape": [40]}, "payload should be uint8"),
    "negative size": ({"shape": [-40, -40]}, "shape should be a list of sizes"),
    "fractional size": ({"shape": [40.0, 40]}, "shape should be a list of sizes"),
    "boolean size": ({"shape": [True, 1600]}, "shape should be a list of sizes"),
    "shape is no list": ({"shape": "1600"}, "shape should be a list of sizes"),
    "many dimensions": ({"shape": [1] * 1000}, "shape should be a list of sizes"),
    "huge shape": ({"shape": [1 << 60, 1 << 60]}, "payload should be uint8"),
    "other block size": ({"block_size": 256}, "payload should be uint8"),
    "odd block size": ({"block_size": 100}, "block_size should be a power of two"),
    "huge block size": ({"block_size": 1 << 40}, "block_size should be a power of two"),
    "no block size": ({"block_size": None}, "block_size of int8"),
    "boolean block size": ({"block_size": True}, "block_size should be a power of two"),
    "more non-finite": ({"num_nonfinite": 2}, "payload should be uint8"),
    "negative non-finite": ({"num_nonfinite": -1}, "num_nonfinite should be a count"),
    "huge non-finite": ({"num_nonfinite": 1 << 62}, "num_nonfinite should be a count"),
    "unserializable": ({"extra": b"x"}, "refused"),
}


@pytest.mark.parametrize(("change", "says"), LIES.values(), ids=LIES)
def test_an_entry_that_lies_is_refused_by_name_and_allocates_nothing(change, says):
    message = messages()
    entry = {**message.header["params"]["a"], **change}
    if "extra" not in change:
        entry = resealed("a", entry, message.values["a"])
    header = {**message.header, "params": {**message.header["params"], "a": entry}}
    tracemalloc.start()
    try:
        with pytest.raises(WireFormatError, match="Parameter 'a' of the message is refused") as refusal:
            decode(message, header)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert says in str(refusal.value)


PAYLOAD_LIES = {
    "truncated": lambda payload: payload[:-1].clone(),
    "other dtype": lambda payload: payload.view(torch.int8),
    "strided": lambda payload: torch.stack([payload, payload], 1)[:, 0],
    "two-dimensional": lambda payload: payload.view(1, -1),
    "empty": lambda payload: payload[:0],
    "no tensor": lambda payload: payload.tolist(),
    "missing": lambda payload: None,
}


@pytest.mark.parametrize("lie", PAYLOAD_LIES.values(), ids=PAYLOAD_LIES)
def test_a_payload_that_lies_is_refused_by_name(lie):
    message = messages()
    with pytest.raises(WireFormatError, match="Parameter 'a' of the message is refused"):
        decode(message, values={**message.values, "a": lie(message.values["a"])})


def test_a_position_outside_of_the_tensor_is_refused():
    message = messages()
    payload = message.values["a"].clone()
    payload[:8].view(torch.int64)[0] = 1600
    entry = resealed("a", message.header["params"]["a"], payload)
    header = {**message.header, "params": {**message.header["params"], "a": entry}}
    with pytest.raises(WireFormatError, match="positions of non-finite weights should be below 1600"):
        decode(message, header, {**message.values, "a": payload})


HEADER_LIES = {
    "no dict": ("int8", "should be of version 1. Found 'str'"),
    "no version": ({"params": {}}, "should be of version 1. Found None"),
    "version 2": ({"version": 2, "params": {}}, "should be of version 1. Found 2"),
    "no params": ({"version": 1}, "in a dict `params` of dicts"),
    "entries are no dicts": ({"version": 1, "params": {"a": 1}}, "in a dict `params` of dicts"),
    "a parameter too many": ({"version": 1, "params": {"z": {}}}, r"Missing: ['z']"),
    "a parameter too few": ({"version": 1, "params": {}}, "should have an entry"),
}


@pytest.mark.parametrize(("header", "says"), HEADER_LIES.values(), ids=HEADER_LIES)
def test_a_header_that_lies_is_refused(header, says):
    with pytest.raises(WireFormatError) as refusal:
        decode(messages(), header)
    assert says in str(refusal.value)


def scalars(value):
    """Paths of all values inside nested dicts and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (key,)
        if isinstance(inner, dict | list):
            yield from ((key, *path) for path in scalars(inner))


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=9),
    st.binary(max_size=9),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_mutated_message_is_refused_or_decodes_to_the_same_values(data):
    message = messages()
    header, values = copy.deepcopy(message.header), dict(message.values)
    if data.draw(st.booleans(), label="mutate the header"):
        *path, last = data.draw(st.sampled_from(sorted(scalars(header), key=str)))
        target = header
        for key in path:
            target = target[key]
        target[last] = data.draw(junk)
    else:
        name = data.draw(st.sampled_from(["a", "b", "norm", "steps"]))
        values[name] = values[name].clone()
        raw = values[name].reshape(-1).view(torch.uint8)
        raw[data.draw(st.integers(0, raw.numel() - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decode_message(values, header, None, lazy=False)[0]
    except WireFormatError:
        return
    expected = decode(message)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert crc32_of(as_tensor(found[name])) == crc32_of(value), name


@pytest.mark.parametrize("precision", GOLDEN)
def test_golden_bytes(precision):
    message = encoded(precision, torch.tensor([GOLDEN_WEIGHTS]))
    payload, num_nonfinite = GOLDEN[precision]
    assert message.values["w"].numpy().tobytes().hex() == payload
    assert message.header["params"]["w"]["num_nonfinite"] == num_nonfinite


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
    precision=st.sampled_from(["fp32", "fp16", "bf16", "int8", "nf4"]),
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
            assert torch.allclose(back.double(), value.double(), atol=2.0)
            assert back.dtype in (torch.float32, torch.float64)
        else:
            assert back.dtype == value.dtype
            assert crc32_of(back) == crc32_of(value)
