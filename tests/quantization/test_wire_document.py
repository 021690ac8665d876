"""A reader of the wire format that knows only docs/wire-format.md, and NumPy."""

import json
import math
import zlib

import numpy as np
import pytest
import torch

from nvflare_llm_components.quantization.int2 import LEVELS as INT2_LEVELS
from nvflare_llm_components.quantization.message import decode_message, encode_message
from nvflare_llm_components.quantization.nf4 import LEVELS
from nvflare_llm_components.quantization.precision import PrecisionPolicy


def read(name: str, entry: dict, payload: bytes) -> np.ndarray:
    fields = {key: value for key, value in entry.items() if key != "crc32"}
    described = json.dumps([name, fields], sort_keys=True, separators=(",", ":")).encode()
    assert entry["crc32"] == zlib.crc32(described + payload)
    if entry["codec"] == "raw":
        return np.frombuffer(payload, entry["dtype"]).reshape(entry["shape"])
    return read_encoded(entry, payload).reshape(entry["shape"])


def read_encoded(entry: dict, payload: bytes) -> np.ndarray:
    size, block, apart = math.prod(entry["shape"]), entry["block_size"], entry["num_nonfinite"]
    if entry["codec"] == "fp16":
        return np.frombuffer(payload, "<f2").astype(np.float32)
    if entry["codec"] == "bf16":
        return bfloat16(payload)
    num_blocks = -(-size // block)
    positions = np.frombuffer(payload, "<i8", apart)
    values = np.frombuffer(payload, "<f4", apart, offset=8 * apart)
    rest = payload[12 * apart :]
    if entry["codec"] == "int8":
        scales, codes = bfloat16(rest[: 2 * num_blocks]), np.frombuffer(rest[2 * num_blocks :], "i1")
        weights = codes.astype(np.float32)
    else:
        table, bits = (LEVELS, 4) if entry["codec"] == "nf4" else (INT2_LEVELS, 2)
        units = np.frombuffer(rest, "<f4", -(-num_blocks // 256))
        squares = np.frombuffer(rest, "u1", num_blocks, offset=units.nbytes).astype(np.float32) ** 2
        scales = squares * np.repeat(units, 256)[:num_blocks]
        packed = np.frombuffer(rest[units.nbytes + num_blocks :], "u1")
        shifts = range(0, 8, bits)
        codes = np.stack([(packed >> shift) % 2**bits for shift in shifts], 1).reshape(-1)[:size]
        weights = np.array(table, np.float32)[codes]
    weights = weights * np.repeat(scales, block)[:size]
    weights[positions] = values
    return weights


def bfloat16(payload: bytes) -> np.ndarray:
    return (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "nf4", "int2"])
@pytest.mark.parametrize("size", [(0, 3), (1, 1), (129, 130)], ids=str)
def test_the_document_suffices_to_read_a_message(precision, size):
    weights = torch.randn(size, generator=torch.Generator().manual_seed(0))
    if weights.numel() > 9:
        weights[1, 2], weights[5, 5] = math.nan, -math.inf
    message = encode_message({"wé": weights}, PrecisionPolicy(precision))
    ours = decode_message(message.values, message.header, None, lazy=False)[0]["wé"]
    theirs = read("wé", message.header["params"]["wé"], message.values["wé"].numpy().tobytes())
    np.testing.assert_array_equal(ours.numpy(), theirs)
