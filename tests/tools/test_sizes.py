import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.random_model import llama_1b_config
from nvflare_llm_components.quantization.precision import PrecisionPolicy
from nvflare_llm_components.tools.sizes import message_size, meta_state_dict, show_sizes, stock_sizes

LORA = '{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}'


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """Llama-3.2-1B's config: 1,235,814,400 weights in 146 tensors."""
    folder: Path = tmp_path_factory.mktemp("llama")
    config = llama_1b_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


def size_of(llama: str, precision: str):
    return message_size(meta_state_dict(llama), PrecisionPolicy(precision), precision)


def test_llama_1b_has_its_tied_weight_once(llama):
    state = meta_state_dict(llama)
    assert len(state) == 146
    assert sum(tensor.numel() for tensor in state.values()) == 1_235_814_400
    assert all(tensor.is_meta for tensor in state.values())


def test_llama_1b_payloads(llama):
    assert size_of(llama, "fp32").payload_bytes == 4_943_257_600
    assert size_of(llama, "fp16").payload_bytes == 2_471_628_800
    assert size_of(llama, "bf16").payload_bytes == 2_471_628_800
    assert size_of(llama, "int8").total_bytes <= 1.26e9
    assert size_of(llama, "nf4").total_bytes <= 0.64e9
    assert size_of(llama, "int2").total_bytes <= 0.36e9


def test_stock_sends_the_tied_weight_twice(llama):
    assert [size.payload_bytes for size in stock_sizes(llama)] == [5_993_930_752, 2_996_965_376]


def test_adapters_are_small(llama):
    state = meta_state_dict(llama, LORA)
    assert len(state) == 64
    assert next(iter(state)) == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert message_size(state, PrecisionPolicy("int8"), "int8").total_bytes < 1e6


def test_the_table_tells_bytes_and_seconds(llama, capsys):
    show_sizes(llama, ["fp32", "int8"], num_clients=3, mbps=1000, console=Console(width=200))
    lines = capsys.readouterr().out.splitlines()
    (fp32,) = (line for line in lines if "4,943,257,600" in line)
    assert "237.3" in fp32  # 2 directions x 3 clients x 4.94 GB at 1 Gbit/s
    assert any("stock fp16" in line and "2,996,965,376" in line for line in lines)


def test_a_message_that_the_timeouts_cut_off_is_named_before_it_is_sent(llama):
    told = io.StringIO()
    show_sizes(llama, ["fp32", "int8"], console=Console(file=told, width=200), rate=10)
    *_, submit, int8 = told.getvalue().splitlines()
    assert submit.startswith("fp32: submit_task_result_timeout: this message takes 65.9 min at 10 Mbit/s; ")
    assert int8 == "int8: 17 min one way at 10 Mbit/s: within the timeouts."
