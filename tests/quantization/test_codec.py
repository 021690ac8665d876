"""Properties that every codec has, whatever the tensor; and the error that each one promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.quantization import chunks
from nvflare_llm_components.quantization.codec import Codec, decode
from nvflare_llm_components.quantization.precision import CODECS
from nvflare_llm_components.quantization.wire import pack, unpack, unpacked_blocks
from nvflare_llm_components.tensors.lazy import BLOCK_LENGTH

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
FLOAT32_MAX = torch.finfo(torch.float32).max
HARD = [0.0, -0.0, 1e-45, 1e-38, 1e-30, 1e30, 65504.0, 65520.0, 3.39e38, FLOAT32_MAX]
LIMIT = {"fp16": 65504.0, "bf16": torch.finfo(torch.bfloat16).max}

sizes = st.one_of(st.integers(0, 400), st.sampled_from([1023, 16384, 16385, (1 << 18) - 1, (1 << 18) + 65]))
scales = st.sampled_from([0.0, 1e-44, 1e-30, 1e-3, 1.0, 1e5, 1e30])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


def round_trip(codec: Codec, weights: torch.Tensor, block_size: int | None = None) -> torch.Tensor:
    encoded = codec.encode(weights, block_size)
    size = codec.num_payload_bytes(weights.numel(), block_size, encoded.num_nonfinite)
    assert encoded.payload.dtype == torch.uint8
    assert encoded.payload.shape == (size,)
    decoded = decode(codec, encoded.payload, weights.numel(), block_size, encoded.num_nonfinite)
    assert decoded.dtype == torch.float32
    return decoded.view(weights.shape)


def gaussian(size: int, scale: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)


def bound(codec: Codec, weights: torch.Tensor) -> torch.Tensor:
    """The largest error that the codec's docstring allows, weight by weight."""
    magnitude = weights.double().abs().nan_to_num(0.0, 0.0, 0.0).clamp(max=FLOAT32_MAX)
    if codec.name in LIMIT:
        relative, tiny = {"fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-133)}[codec.name]
        twice = 2.0**-12 if weights.dtype == torch.float64 else 1e-6  # it is rounded to float32 first
        return (magnitude * relative).clamp(min=tiny) * (1 + twice)
    block = codec.default_block_size
    blocks = torch.nn.functional.pad(magnitude, (0, -magnitude.numel() % block)).view(-1, block).amax(1)
    if codec.name == "int8":
        of_block = (blocks / 127 * (1 + 2.0**-7) + 2.0**-126) * 0.5001
        return of_block.repeat_interleave(block)[: magnitude.numel()]
    if codec.name == "int2":  # of itself, or of the inner level
        groups = torch.nn.functional.pad(blocks, (0, -blocks.numel() % 256)).view(-1, 256).amax(1)
        group = groups.repeat_interleave(256)[: blocks.numel()] / 255 + 2.0**-100
        inner = (0.351 * (blocks + group) + group).repeat_interleave(block)[: magnitude.numel()]
        return torch.maximum(magnitude, inner)
    groups = torch.nn.functional.pad(blocks, (0, -blocks.numel() % 256)).view(-1, 256).amax(1)
    group = groups.repeat_interleave(256)[: blocks.numel()] / 255 + 2.0**-108
    return (0.153 * (blocks + group) + blocks / 128 + group).repeat_interleave(block)[: magnitude.numel()]


@codecs
@settings(max_examples=60, deadline=None)
@given(size=sizes, scale=scales, dtype=dtypes, seed=st.integers(0, 9))
def test_error_stays_within_the_promised_bound(codec, size, scale, dtype, seed):
    weights = gaussian(size, scale, dtype, seed)
    if codec.name in LIMIT:
        weights = weights.double().clamp(-LIMIT[codec.name], LIMIT[codec.name]).to(dtype)
    error = (round_trip(codec, weights).double() - weights.double()).abs()
    finite = weights.isfinite()
    assert bool((error[finite] <= bound(codec, weights)[finite]).all())


@codecs
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.sampled_from([*HARD, 0.02, -1.5, math.nan, math.inf, -math.inf]), max_size=300))
def test_nonfinite_weights_keep_their_place_and_nothing_else_becomes_one(codec, values):
    weights = torch.tensor(values, dtype=torch.float32)
    decoded = round_trip(codec, weights)
    assert torch.equal(decoded.isnan(), weights.isnan())
    assert torch.equal(decoded.isinf(), weights.isinf())
    assert torch.equal(decoded[decoded.isinf()], weights[weights.isinf()])


@codecs
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (7, 9), (2, 3, 5), (64, 64)], ids=str)
def test_any_shape_comes_back(codec, shape):
    weights = torch.randn(shape)
    decoded = round_trip(codec, weights)
    assert decoded.shape == weights.shape
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    assert torch.allclose(decoded, weights, rtol=0.0, atol=largest * (0.9 if codec.name == "int2" else 0.2))


@codecs
def test_zeros_come_back_exactly_also_beside_large_blocks(codec):
    weights = torch.randn(64, 256)
    weights[3:9] = 0.0
    assert not round_trip(codec, weights)[3:9].any()


@codecs
def test_strides_do_not_matter(codec):
    weights = torch.randn(130, 70)
    expected = codec.encode(weights.t().contiguous(), None).payload
    assert torch.equal(codec.encode(weights.t(), None).payload, expected)
    assert torch.equal(
        codec.encode(weights[::2, 1:], None).payload, codec.encode(weights[::2, 1:].clone(), None).payload
    )


@codecs
def test_equal_input_gives_equal_bytes_and_stays_unchanged(codec):
    weights = torch.randn(1000)
    weights[5] = math.nan
    before = weights.clone()
    first = codec.encode(weights, None).payload
    assert torch.equal(first, codec.encode(weights, None).payload)
    assert torch.equal(weights.view(torch.int32), before.view(torch.int32))


@codecs
def test_a_gaussian_loses_what_the_docstring_says(codec):
    weights = gaussian(1 << 20, 0.02, torch.float32)
    relative = float((round_trip(codec, weights) - weights).norm() / weights.norm())
    assert (
        relative <= {"fp16": 3e-4, "bf16": 2.4e-3, "int8": 0.0070, "nf4": 0.0919, "int2": 0.3365}[codec.name]
    )


def test_bits_a_weight():
    size = 1 << 24
    bits = {name: 8 * codec.num_payload_bytes(size, None, 0) / size for name, codec in CODECS.items()}
    assert bits == {"fp16": 16.0, "bf16": 16.0, "int8": 8.125, "nf4": 4.126953125, "int2": 2.126953125}


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_finite_weights_beyond_the_range_saturate_and_are_counted(name):
    limit = LIMIT[name]
    weights = torch.tensor([1.0, FLOAT32_MAX, -FLOAT32_MAX, math.inf])
    encoded = CODECS[name].encode(weights, None)
    assert decode(CODECS[name], encoded.payload, 4, None, 0).tolist() == [1.0, limit, -limit, math.inf]
    assert encoded.num_saturated == 2


@codecs
def test_float64_beyond_float32_saturates(codec):
    weights = torch.tensor([1e300, -1e300, math.inf, math.nan], dtype=torch.float64)
    decoded = round_trip(codec, weights)
    assert decoded[0] > 6e4
    assert decoded[1] == -decoded[0]
    assert decoded.isinf().tolist() == [False, False, True, False]
    assert decoded.isnan().tolist() == [False, False, False, True]


@pytest.mark.parametrize("name", ["int8", "nf4", "int2"])
@pytest.mark.parametrize("block_size", [16, 64, 256, 1024])
def test_block_sizes(name, block_size):
    weights = torch.randn(5000)
    assert torch.allclose(
        round_trip(CODECS[name], weights, block_size), weights, atol=3.5 if name == "int2" else 0.8
    )


@pytest.mark.gpu
@codecs
@settings(max_examples=40, deadline=None)
@given(size=sizes, scale=scales, dtype=dtypes, special=st.sampled_from([0.0, math.nan, math.inf, 1e30]))
def test_a_gpu_gives_the_same_bytes(codec, size, scale, dtype, special):
    weights = gaussian(size, scale, dtype)
    weights[3:5] = special
    on_cpu, on_gpu = codec.encode(weights, None), codec.encode(weights.cuda(), None)
    assert torch.equal(on_cpu.payload, on_gpu.payload.cpu())
    decode = (size, None, on_cpu.num_nonfinite)
    from_gpu = decode(codec, on_gpu.payload, *decode).cpu()
    assert torch.equal(decode(codec, on_cpu.payload, *decode).view(torch.int32), from_gpu.view(torch.int32))


@codecs
def test_threads_do_not_change_a_byte(codec):
    weights = gaussian((1 << 21) + 77, 1.0, torch.float32)
    weights[[5, (1 << 20) + 3, -1]] = torch.tensor([math.nan, math.inf, -math.inf])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = codec.encode(weights, None)
        torch.set_num_threads(3)
        together = codec.encode(weights, None)
        decoded = round_trip(codec, weights)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.payload, together.payload)
    alone_decoded = decode(codec, alone.payload, weights.numel(), None, alone.num_nonfinite)
    assert torch.equal(alone_decoded.view(torch.int32), decoded.view(torch.int32))


@codecs
@pytest.mark.parametrize("size", [1, BLOCK_LENGTH - 1, BLOCK_LENGTH + 1, 2 * BLOCK_LENGTH + 77])
@pytest.mark.parametrize("block_size", [None, 1024])
def test_blocks_are_the_whole(codec, size, block_size):
    weights = gaussian((size,), 1.0, torch.float32)
    weights[::BLOCK_LENGTH] = math.nan  # the first of each block
    weights[BLOCK_LENGTH - 1 :: BLOCK_LENGTH] = math.inf  # and the last
    payload, entry, _ = pack("w", weights, codec, block_size if codec.default_block_size else None)
    found = torch.cat([block.clone() for block in unpacked_blocks(payload, entry)])
    whole = unpack(payload, entry)
    # A NaN's bits are torch's choice: it gives those of fp16 others at a tensor's end than inside of it.
    is_same = (found.view(torch.int32) == whole.view(torch.int32)) | (found.isnan() & whole.isnan())
    assert bool(is_same.all())


@codecs
def test_how_many_cores_there_are_changes_no_byte(codec, monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK", 2**18)
    weights = torch.randn(5 * 2**18 + 77, generator=torch.Generator().manual_seed(3))
    weights[[5, 2**18 - 1, 2**18, 3 * 2**18 + 9, -1]] = torch.tensor(
        [torch.inf, torch.nan, -torch.inf, 3e38, torch.nan]
    )
    of_number = {}
    for number in (1, 2, 3, 16):
        monkeypatch.setattr(chunks, "num_workers", lambda number=number: number)
        encoded = codec.encode(weights, None)
        sizes = weights.numel(), codec.default_block_size, encoded.num_nonfinite
        of_number[number] = encoded, decode(codec, encoded.payload, *sizes)
    alone, decoded_alone = of_number.pop(1)
    for encoded, decoded in of_number.values():
        assert torch.equal(encoded.payload, alone.payload)
        assert (encoded.num_nonfinite, encoded.num_saturated) == (alone.num_nonfinite, alone.num_saturated)
        assert torch.equal(decoded.view(torch.int32), decoded_alone.view(torch.int32))


@codecs
def test_weights_that_are_made_as_they_are_read_are_encoded_as_a_tensor_is(codec):
    weights = torch.randn(3, 2**19 + 7, generator=torch.Generator().manual_seed(4))
    made = chunks.MadeValues(weights.shape, lambda part: weights.view(-1)[part].clone())
    assert torch.equal(codec.encode(made, None).payload, codec.encode(weights, None).payload)


@codecs
def test_weights_that_are_not_finite_are_looked_for_in_their_own_block_alone(codec, monkeypatch):
    """A message may hold nothing else: each block must not go through all of them."""
    if codec.default_block_size is None:
        pytest.skip("stores them as what they are")
    weights = torch.full((4 * BLOCK_LENGTH,), torch.nan)
    encoded = codec.encode(weights, None)
    touched = []
    monkeypatch.setattr(torch.Tensor, "__getitem__", counting(touched))
    entry = {"codec": codec.name, "shape": [weights.numel()], "dtype": "float32"}
    entry |= {"block_size": codec.default_block_size, "num_nonfinite": weights.numel()}
    assert all(block.isnan().all() for block in unpacked_blocks(encoded.payload, entry))
    assert max(touched, default=0) <= BLOCK_LENGTH


def counting(touched: list[int]):
    """Tensor.__getitem__ that notes how many indices or mask values it was given."""
    getitem = torch.Tensor.__getitem__

    def noted(self, index):
        if isinstance(index, torch.Tensor):
            touched.append(index.numel())
        return getitem(self, index)

    return noted


@given(st.floats(width=32, min_value=2.0**-120, max_value=FLOAT32_MAX))
@settings(max_examples=300, deadline=None)
def test_the_largest_weight_of_an_int8_block_has_a_code_of_at_most_127(largest):
    """Nothing clips it: a code of 128 would come back with the other sign."""
    codec = CODECS["int8"]
    encoded = codec.encode(torch.tensor([largest, -largest] * 64), None)
    codec.check(encoded.payload, 128, 128, 0)
    code = int(encoded.payload[2:].view(torch.int8)[0])
    assert 0 < code <= 127
    assert encoded.payload[2:].view(torch.int8).tolist() == [code, -code] * 64
