"""Weights out under checkpoint names, and in again in place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from nvflare_llm_components.training import weights
from nvflare_llm_components.training.model import load_model


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts, whose checkpoint has one tensor an expert, and the model one for all."""
    folder = tmp_path_factory.mktemp("experts")
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=12,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["model_folder", "experts"])
def test_what_goes_out_is_the_checkpoint(kind, request):
    folder = request.getfixturevalue(kind)
    found, expected = weights.snapshot(load_model(str(folder), {})), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["model_folder", "experts"])
def test_what_comes_in_is_there_in_place(kind, request):
    model = load_model(str(request.getfixturevalue(kind)), {})
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    given = {name: torch.rand_like(value) for name, value in weights.snapshot(model).items()}
    print_of = weights.load(model, given)
    assert places == {name: value.data_ptr() for name, value in model.named_parameters()}
    found = weights.snapshot(model)
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert weights.load(model, given) == print_of
    name = next(iter(given))
    assert weights.load(model, given | {name: given[name] + 1}) != print_of


def test_a_loaded_mixture_of_experts_speaks_as_its_checkpoint(experts, tmp_path):
    model = load_model(str(experts), {})
    weights.load(model, {name: value * 1.5 for name, value in weights.snapshot(model).items()})
    model.save_pretrained(tmp_path)
    tokens = torch.arange(8)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_precisions_are_kept_by_the_model(model_folder):
    model = load_model(str(model_folder), {"dtype": "bfloat16"})
    sent = weights.snapshot(model)
    weights.load(model, {name: value.to(torch.float64) for name, value in sent.items()})
    again = weights.snapshot(model)
    assert {value.dtype for value in again.values()} == {torch.bfloat16}
    assert all(torch.equal(again[name], sent[name]) for name in sent)


def test_a_copy_shares_no_memory_with_the_model(model_folder):
    model = load_model(str(model_folder), {})
    live = {value.data_ptr() for value in model.state_dict().values()}
    assert not live & {value.data_ptr() for value in weights.snapshot(model).values()}


def test_a_difference_is_in_float32():
    new, old = torch.tensor([1.0]), torch.tensor([1.0 - 2**-10], dtype=torch.float64)
    found = weights.difference({"w": new, "n": torch.tensor([3])}, {"w": old, "n": torch.tensor([1])})
    assert found["w"].materialize().item() == 2**-10
    assert found["w"].dtype == torch.float32
    assert found["n"].item() == 0  # an index that is added to itself is another one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_that_did_not_train_has_no_change(dtype: torch.dtype, model_folder: Path):
    model = load_model(str(model_folder), {"dtype": dtype})
    torch.manual_seed(0)
    received = {n: v.float() + 1e-3 * torch.randn(v.shape) for n, v in weights.snapshot(model).items()}
    weights.load(model, received)
    change = weights.difference(weights.present(model), received)
    assert change.keys() == received.keys()
    assert not any(value.count_nonzero() for value in change.values())


def test_what_is_present_is_a_snapshot_when_it_is_read(model_folder: Path):
    model = load_model(str(model_folder), {})
    values, copies = weights.present(model), weights.snapshot(model)
    assert values.keys() == copies.keys()
    for name, value in values.items():
        assert (value.shape, value.dtype) == (copies[name].shape, copies[name].dtype)
        assert torch.equal(torch.cat([*value.blocks()]), copies[name].reshape(-1))
        read = value.materialize().zero_()  # it is its reader's own
        assert read.is_contiguous()
        assert torch.equal(value.materialize(), copies[name])


@pytest.mark.parametrize(("found", "stored"), [([2.0, 6.9999995], [2, 7]), ([1, 3], [1, 3])])
def test_averages_of_integers_come_in_as_the_integers_that_they_are(found, stored):
    layout = {"steps": ((2,), torch.int32)}
    ((_, value),) = weights.checked({"steps": torch.tensor(found)}, layout)
    assert value.equal(torch.tensor(stored, dtype=torch.int32))


@pytest.mark.parametrize("found", [[1.0, 2.5], [1.0, torch.inf], [1j, 2j]])
def test_what_is_no_integer_does_not_come_in_for_one(found):
    with pytest.raises(ValueError, match=r"expected torch\.int32 or whole numbers in 'steps'"):
        list(weights.checked({"steps": torch.tensor(found)}, {"steps": ((2,), torch.int32)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.double() * 0 + 1e300, "expected finite values in"),
        (lambda value: value * torch.nan, "expected finite values in"),
        (lambda value: value.to(torch.complex64), r"expected torch\.float32 or another float in"),
        (lambda value: value.to(torch.int64), r"expected torch\.float32 or another float in"),
        (lambda value: value.to(torch.bool).numpy(), r"another float in 'model\..*', found torch\.bool"),
    ],
)
def test_what_would_not_be_finite_in_the_model_does_not_come_in(change, words, model_folder):
    model = load_model(str(model_folder), {})
    before = weights.snapshot(model)
    with pytest.raises(ValueError, match=words):
        weights.load(model, {name: change(value) for name, value in before.items()})
    assert all(value.equal(before[name]) for name, value in weights.snapshot(model).items())
