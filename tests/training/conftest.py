"""A tiny Llama, and rows for it."""

import importlib.util
from pathlib import Path

import pytest

from tests.tiny import save_tiny_model, write_rows

NUM_ROWS = 10
SFT = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "max_length": 64,
    "seed": 7,
}
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
}
NF4_BASE = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes: pip install 'nvflare-llm-components[qlora]'",
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), attention_dropout=0.1)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, object]] = [{"input": f"{n} + {n}", "output": str(2 * n)} for n in range(NUM_ROWS)]
    return write_rows(tmp_path_factory.mktemp("data") / "training.jsonl", rows)
