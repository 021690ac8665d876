"""A kind of adapter through a federation: does it work, resume, and travel in fewer bits?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM

from nvflare_llm_components.quantization.message import decode_message, encode_message
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.training.weights import StateDict
from tests.families.federation import NUM_ROUNDS, Server, average, open_site, train
from tests.tiny import save_tiny_model

TOLERANCE = 1e-5  # of logits: some kinds split the base again when they are opened


@dataclass
class Outcome:
    """What a run of a kind showed; sizes are bytes of one message in float32, int8 and nf4."""

    fp32: int
    int8: int
    nf4: int


def base_model(folder: Path) -> Path:
    """A tiny Llama whose head is not its embeddings."""
    return save_tiny_model(folder, tie_word_embeddings=False)


def run_kind(peft_config: dict[str, Any], base: Path, folder: Path) -> Outcome:
    """Federate a kind over two rounds, with a restarted site, and open what was saved.

    Both sites have the same rows, so the one that is restarted must go on to the other's bits.

    Raises:
        AssertionError: something of this does not hold.
    """
    server = Server.start(folder / "server", model_name_or_path=str(base), peft_config=peft_config)
    first = dict(server.weights)

    def opened(name: str) -> Any:
        return open_site(folder / name, base, "same", peft_config, checkpoint="always")

    sites = [opened("one"), opened("two")]
    for round_number in range(NUM_ROUNDS):
        results = [train(site, server.weights, round_number) for site in sites]
        assert all(result.keys() == server.weights.keys() for result in results)
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0]), "restarted"
        server.save(average(results), round_number)
        sites[1].close()
        sites[1] = opened("two")
    assert any(not torch.equal(server.weights[name], first[name]) for name in first), "trained"
    sites[0].load(server.weights)
    _is_what_is_saved(server.last, sites[0]._engine.trainer.model)
    resumed = Server.start(
        folder / "server",
        "job-2",
        model_name_or_path=str(base),
        peft_config=peft_config,
        resume_from=str(server.last.parent.parent),
    )
    assert all(torch.equal(resumed.weights[name], value) for name, value in server.weights.items())
    for site in sites:
        site.close()
    return Outcome(
        sum(value.nbytes for value in first.values()),
        *(_travel(server.weights, precision) for precision in ("int8", "nf4")),
    )


def _is_what_is_saved(folder: Path, live: Any) -> None:
    opened, tokens = AutoPeftModelForCausalLM.from_pretrained(folder).eval(), torch.arange(3, 19)[None]
    with torch.no_grad():
        difference = (opened(tokens).logits - live.eval()(tokens).logits).abs().max()
    assert difference < TOLERANCE, f"opened again: {difference:.1e}"


def _travel(weights: StateDict, precision: str) -> int:
    """Bytes of a message; what arrives has the names, shapes and dtypes that were sent, and is finite."""
    message = encode_message(weights, PrecisionPolicy(precision))
    arrived, _ = decode_message(message.values, message.header, None, lazy=False)
    for name, value in weights.items():
        found = torch.as_tensor(arrived[name])
        assert (found.shape, found.dtype) == (value.shape, value.dtype)
        assert torch.isfinite(found).all() if value.is_floating_point() else torch.equal(found, value)
    return sum(value.nbytes for value in message.values.values())
