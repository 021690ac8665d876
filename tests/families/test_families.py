"""Every family through a federation of two sites and two rounds."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families.configs import FAMILIES, FAST, tiny_config
from tests.families.federation import NUM_ROUNDS, Server, average, open_site, train
from tests.tiny import tiny_tokenizer

CASES = [
    pytest.param(family, marks=[] if family in FAST else [pytest.mark.slow], id=family) for family in FAMILIES
]


@pytest.mark.parametrize("family", CASES)
def test_a_family_is_federated(family: str, tmp_path: Path):
    torch.manual_seed(0)
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    server = Server.start(tmp_path / "server", model_name_or_path=str(source))
    sites = [open_site(tmp_path / name, source, name) for name in ("one", "two")]
    for round_number in range(NUM_ROUNDS):
        results = [train(site, server.weights, round_number) for site in sites]
        assert all(result.keys() == server.weights.keys() for result in results)
        assert any(not torch.equal(results[0][name], results[1][name]) for name in server.weights)
        server.save(average(results), round_number)
    sites[0].load(server.weights)
    live = sites[0]._engine.trainer.model.eval()
    opened = AutoModelForCausalLM.from_pretrained(server.last).eval()
    expected, tokens = live.state_dict(), torch.arange(3, 19)[None]
    assert opened.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in opened.state_dict().items())
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, live(tokens).logits)
    for site in sites:
        site.close()
