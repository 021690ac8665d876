"""Whatever does not keep to the wire format is refused by name, however well it is sealed."""

import contextlib
import copy
import functools
import math
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.quantization.message import (
    Message,
    decode_message,
    encode_message,
)
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.quantization.wire import WireFormatError, crc32_of, sealed
from nvflare_llm_components.tensors.convert import as_tensor

NESTED: list = []
for _ in range(100_000):
    NESTED = [NESTED]


@functools.cache
def messages() -> Message:
    """The same one each time: nobody may change it."""
    weights = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    weights[3, 4], weights[7, 8] = math.nan, math.inf
    values = {"a": weights, "b": weights[:3] * 1e-3, "norm": torch.ones(7), "steps": torch.tensor(3)}
    return encode_message(values, PrecisionPolicy("int8", overrides={"b": "nf4"}))


def decode(message: Message, header=None, values=None) -> dict:
    return decode_message(values or message.values, header or message.header, None, lazy=False)[0]


def resealed(name: str, entry: dict, payload: torch.Tensor) -> dict:
    """An entry that lies, with a checksum that doesn't."""
    return sealed(name, entry, payload)


LIES = {
    "unknown codec": (
        {"codec": "int3"},
        "codec should be one of raw, fp16, bf16, int8, nf4, int2. Found 'int3'",
    ),
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
    "huge shape": ({"shape": [1 << 60, 1 << 60]}, "shape should be of at most"),
    "huge shape of no weights": ({"shape": [0, 1 << 62, 4]}, "shape should be of at most"),
    "unspeakable size": ({"shape": [10**5000]}, "shape should be of at most 1099511627776 weights. Found"),
    "nested shape": ({"shape": NESTED}, "shape should be a list of sizes. Found [[[[[["),
    "nested codec": ({"codec": NESTED}, "codec should be one of"),
    "unknown field": ({"extra": 1}, "fields should be among block_size, codec, crc32"),
    "nested field": ({"extra": NESTED}, "fields should be among block_size, codec, crc32"),
    "forged line": ({"codec": "int8\nERROR all is lost"}, r"Found 'int8\nERROR all is lost'"),
    "flag that is none": ({"numpy": 1}, "numpy should be true where it is there. Found 1"),
    "shadow without a shadow": (
        {"shadow": True},
        "no step of a shadow should mark no parameter. Found ['a']",
    ),
    "other block size": ({"block_size": 256}, "payload should be uint8"),
    "odd block size": ({"block_size": 100}, "block_size should be a power of two"),
    "huge block size": ({"block_size": 1 << 40}, "block_size should be a power of two"),
    "no block size": ({"block_size": None}, "block_size of int8"),
    "boolean block size": ({"block_size": True}, "block_size should be a power of two"),
    "more non-finite": ({"num_nonfinite": 3}, "payload should be uint8"),
    "negative non-finite": ({"num_nonfinite": -1}, "num_nonfinite should be a count"),
    "huge non-finite": ({"num_nonfinite": 1 << 62}, "num_nonfinite should be a count"),
    "unserializable": ({"extra": b"x"}, "refused"),
}


@pytest.mark.parametrize(("change", "says"), LIES.values(), ids=LIES)
def test_an_entry_that_lies_is_refused_by_name_and_allocates_nothing(change, says):
    message = messages()
    entry = {**message.header["params"]["a"], **change}
    with contextlib.suppress(TypeError, ValueError, RecursionError):  # what can't be sealed is sent without
        entry = resealed("a", entry, message.values["a"])
    header = {**message.header, "params": {**message.header["params"], "a": entry}}
    tracemalloc.start()
    try:
        with pytest.raises(WireFormatError, match="'a'") as refusal:
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


def forged(message: Message, name: str, payload: torch.Tensor) -> dict:
    """What arrives of a parameter whose sender sealed another payload."""
    entry = resealed(name, message.header["params"][name], payload)
    header = {**message.header, "params": {**message.header["params"], name: entry}}
    return decode(message, header, {**message.values, name: payload})


def hostile(dtype: torch.dtype, start: int, *numbers: float):
    """A change of a payload: `numbers` of `dtype` from byte `start` on."""
    return lambda payload: payload[start : start + len(numbers) * dtype.itemsize].copy_(
        torch.tensor(numbers, dtype=dtype).view(torch.uint8)
    )


int64, float32, bfloat16 = torch.int64, torch.float32, torch.bfloat16
SEALED_LIES = {  # a: int8 with two weights that are not finite; b: nf4
    "position outside": ("a", hostile(int64, 0, 1600), "positions of non-finite weights should ascend below"),
    "negative position": ("a", hostile(int64, 0, -1), "positions of non-finite weights should ascend below"),
    "position twice": ("a", hostile(int64, 0, 9, 9), "positions of non-finite weights should ascend below"),
    "positions descend": (
        "a",
        hostile(int64, 0, 9, 8),
        "positions of non-finite weights should ascend below",
    ),
    "finite value apart": ("a", hostile(float32, 16, 1e30), "should be NaN or infinite. Found a finite one"),
    "scale is NaN": ("a", hostile(bfloat16, 24, math.nan), "scales should be from 1.17549e-38 to"),
    "scale is infinite": ("a", hostile(bfloat16, 26, math.inf), "scales should be from"),
    "scale is negative": ("a", hostile(bfloat16, 26, -1.0), "Found -1 to"),
    "scale is zero": ("a", hostile(bfloat16, 26, 0.0), "Found 0 to"),
    "scale near the maximum": ("a", hostile(bfloat16, 26, 3e38), "to 2.67923e+36. Found"),
    "code beyond its range": ("a", hostile(torch.int8, 400, -128), "codes should be from -127 to 127"),
    "unit is NaN": ("b", hostile(float32, 0, math.nan), "units should be from"),
    "unit is infinite": ("b", hostile(float32, 0, math.inf), "units should be from"),
    "unit is negative": ("b", hostile(float32, 0, -1e-3), "units should be from"),
    "unit is zero": ("b", hostile(float32, 0, 0.0), "units should be from"),
    "unit near the maximum": ("b", hostile(float32, 0, 3e38), "units should be from"),
}


@pytest.mark.parametrize(("name", "change", "says"), SEALED_LIES.values(), ids=SEALED_LIES)
def test_numbers_that_no_encoder_writes_are_refused_by_name_though_the_seal_is_right(name, change, says):
    message = messages()
    payload = message.values[name].clone()
    assert forged(message, name, payload)
    change(payload)
    with pytest.raises(WireFormatError, match=f"Parameter '{name}' of the message is refused") as refusal:
        forged(message, name, payload)
    assert says in str(refusal.value)


OF_1 = {"version": 1, "precision": "int8"}
HEADER_LIES = {
    "no dict": ("int8", "should be of version 1. Found 'str'"),
    "no version": ({"params": {}}, "should be of version 1. Found None"),
    "version 2": ({"version": 2, "params": {}}, "should be of version 1. Found 2"),
    "version of another kind": ({"version": True, "params": {}}, "should be of version 1. Found True"),
    "nested version": ({"version": NESTED}, "should be of version 1. Found [[["),
    "no params": ({"version": 1}, "in a dict `params` of dicts"),
    "entries are no dicts": ({"version": 1, "params": {"a": 1}}, "in a dict `params` of dicts"),
    "a parameter too many": ({**OF_1, "params": {"z": {}}}, r"Missing: ['z']"),
    "a parameter too few": ({**OF_1, "params": {}}, "should be described in"),
    "a long name": ({**OF_1, "params": {"z" * 2000: {}}}, "names should be of at most 1000 characters"),
    "no name": ({**OF_1, "params": {1: {}}}, "names should be of at most 1000 characters. Found 1"),
    "the header's own name": (
        {**OF_1, "params": {"__metadata__": {}}},
        "no parameter should be named '__metadata__'",
    ),
    "no precision": ({"version": 1, "params": {}}, "precision should be one of fp32, fp16"),
    "forged log": ({**OF_1, "precision": "int8\nERROR", "params": {}}, r"Found 'int8\nERROR'"),
    "long precision": ({**OF_1, "precision": "x" * 10**6, "params": {}}, "precision should be one of"),
    "unknown field": ({**OF_1, "params": {}, "code": "x"}, "fields should be among params, precision"),
    "nested field": ({**OF_1, "params": {}, "code": NESTED}, "fields should be among params, precision"),
    "no round": ({**OF_1, "params": {}, "taken_round": "1"}, "taken_round should be the number of a round"),
    "huge round": ({**OF_1, "params": {}, "taken_round": 1 << 40}, "taken_round should be the number of"),
    "no shadow": ({**OF_1, "params": {}, "shadow": "a"}, "shadow should hold an id of eight hex digits"),
    "shadow id": (
        {**OF_1, "params": {}, "shadow": {"id": "../../../x"}},
        "shadow should hold an id of eight",
    ),
    "shadow base": (
        {**OF_1, "params": {}, "shadow": {"id": "0" * 8, "base": 7}},
        "the base of its shadow should be eight hex digits. Found 7",
    ),
}


@pytest.mark.parametrize(("header", "says"), HEADER_LIES.values(), ids=HEADER_LIES)
def test_a_header_that_lies_is_refused_in_one_bounded_line(header, says):
    with pytest.raises(WireFormatError) as refusal:
        decode(messages(), header)
    assert says in str(refusal.value)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500


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
    assert {name: crc32_of(as_tensor(value)) for name, value in found.items()} == sums()


@functools.cache
def sums() -> dict[str, int]:
    return {name: crc32_of(value) for name, value in decode(messages()).items()}


def numbers_of(payload: torch.Tensor, entry: dict, found: torch.Tensor) -> int:
    """How many weights that are not finite a payload honestly brings."""
    if entry["codec"] == "raw" or entry["block_size"] is None:
        return int((~found.double().isfinite()).sum())  # 16-bit floats hold them among the others
    return entry["num_nonfinite"]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_hostile_sender_who_seals_what_he_forges_gets_no_wrong_number_in(data):
    """He may change any field and any byte, and computes the right checksum: what decodes is finite."""
    precision = data.draw(st.sampled_from(["fp16", "bf16", "int8", "nf4", "int2"]))
    weights = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    weights[2, 3] = math.inf
    message = encode_message({"a": weights}, PrecisionPolicy(precision))
    entry, payload = dict(message.header["params"]["a"]), message.values["a"].clone()
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, payload.numel() - 1))
        raw = torch.frombuffer(bytearray(data.draw(st.binary(min_size=1, max_size=16))), dtype=torch.uint8)
        raw = raw[: payload.numel() - start]
        payload[start : start + raw.numel()] = raw
    if data.draw(st.booleans()):
        entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(junk)
    try:
        entry = resealed("a", entry, payload)
    except (TypeError, ValueError):
        return  # can't be sealed, so it is refused as the others are
    try:
        found = decode(message, {**message.header, "params": {"a": entry}}, {"a": payload})["a"]
    except WireFormatError as e:
        assert "Parameter 'a' of the message is refused" in str(e)  # noqa: PT017
        return
    assert list(found.shape) == list(entry["shape"])
    assert int((~found.isfinite()).sum()) == numbers_of(payload, entry, found)
