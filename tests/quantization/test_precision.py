"""Which parameter travels at which precision."""

import time

import pytest
import torch

from nvflare_llm_components.policy.site import FOR_DIFFERENCES
from nvflare_llm_components.quantization.precision import CODECS, PRECISIONS, PrecisionPolicy

WEIGHT = torch.zeros(300, 300)


def name_of(policy: PrecisionPolicy, parameter: str, weights: torch.Tensor = WEIGHT) -> str:
    codec = policy.codec_of(parameter, weights)
    return codec.name if codec else "as it is"


def test_codecs_that_are_for_differences_are_known_to_those_who_write_jobs():
    assert tuple(name for name, codec in CODECS.items() if codec.is_for_differences) == FOR_DIFFERENCES


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_weights_get_int8_in_the_place_of_a_code_for_differences(precision):
    policy = PrecisionPolicy(precision, overrides={"embed": "int2", "head": "bf16"})
    whole = policy.for_whole_weights()
    expected = "int8" if precision in FOR_DIFFERENCES else name_of(policy, "layer")
    assert [name_of(whole, name) for name in ("layer", "embed", "head")] == [expected, "int8", "bf16"]
    assert policy.has_differences
    assert not whole.has_differences


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (torch.zeros(300, 300), "int2"),
        (torch.zeros(300), "as it is"),
        (torch.zeros(1 << 17), "int2"),
        (torch.zeros(300, 300, dtype=torch.int64), "as it is"),
        (torch.zeros(300, 300).to(torch.float8_e4m3fn), "as it is"),
        (torch.zeros(300, 300, dtype=torch.bfloat16), "int2"),
    ],
)
def test_small_vectors_and_what_is_no_wide_float_travel_as_they_are(weights, expected):
    assert name_of(PrecisionPolicy("int2"), "w", weights) == expected
    assert name_of(PrecisionPolicy("fp32", overrides={"w": "fp16"}), "w", weights.bfloat16()) == "as it is"


def test_a_pattern_that_would_hang_python_is_matched_in_linear_time():
    started = time.process_time()
    assert name_of(PrecisionPolicy("fp16", overrides={"(a+)+$": "int8"}), "a" * 5000 + "b") == "fp16"
    assert time.process_time() - started < 1.0  # backtracking would take 2**5000 steps


@pytest.mark.parametrize("pattern", ["(", "(?=a)b", r"(a)\1", "a" * 1001, "a\nERROR" + "x" * 2000])
def test_a_pattern_beyond_re2_is_refused_in_one_line_when_the_job_is_parsed(pattern):
    with pytest.raises(ValueError, match="overrides") as refusal:
        PrecisionPolicy("fp16", overrides={pattern: "int8"})
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 1500


def test_overrides_are_few():
    """A hundred thousand took ten seconds to compile, and minutes of each message."""
    PrecisionPolicy("fp16", overrides={f"layer{n}": "int8" for n in range(200)})
    with pytest.raises(ValueError, match=r"overrides should be at most 200 patterns.*Found 201"):
        PrecisionPolicy("fp16", overrides={f"layer{n}": "int8" for n in range(201)})
