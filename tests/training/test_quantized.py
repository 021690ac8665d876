"""An adapter over a base of 4 bits: the bits of plain TRL, and refusals that say what to do."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.training.model import load_model
from nvflare_llm_components.training.quantized import check_base
from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.settings import TrainingSettings
from tests.tiny import save_tiny_model
from tests.training.conftest import LORA, NF4_BASE, SFT, needs_bitsandbytes
from tests.training.test_exactness import assert_same, centralized, compare, erase, sft_config

NUM_STEPS = 4


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for what bitsandbytes does to the weights of some CPUs in the first evaluation."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "attention_dropout": 0.1}
    return save_tiny_model(tmp_path_factory.mktemp("wide"), **sizes)


def settings_of(model: Path, data: Path, **changes: Any) -> TrainingSettings:
    arguments: dict[str, Any] = {
        "sft_config": SFT | {"lr_scheduler_type": "cosine"},
        "peft_config": LORA,
        "model_kwargs": NF4_BASE,
        "local_steps": NUM_STEPS,
        **changes,
    }
    return TrainingSettings(model_name_or_path=str(model), train_data=data, **arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_processes": 2, "sharding": "full"}, "sharding: expected 'none' for a quantized base"),
        ({"peft_config": None}, "peft_config: expected an adapter over a quantized base"),
        ({"model_kwargs": {"quantization_config": {"bnb_4bit_quant_type": "nf4"}}}, "found 0"),
        (
            {"model_kwargs": {"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}},
            "found 2",
        ),
    ],
)
def test_what_cannot_train_over_a_quantized_base_is_refused(changes, words, tmp_path: Path):
    with pytest.raises(ReportableError, match=words):
        check_base(settings_of(tmp_path, tmp_path, **changes))


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest),
    )
    with pytest.raises(ReportableError, match=r"bitsandbytes .* not installed at this site\. Type: pip inst"):
        SFTSession(settings_of(model_folder, data_file), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_so_it_is_for_a_base_that_is_quantized_on_disk(tmp_path: Path):
    save_tiny_model(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ReportableError, match=r"model_name_or_path: .*pip install .*bitsandbytes"):
        load_model(str(tmp_path), {})


@needs_bitsandbytes
@pytest.mark.parametrize("accumulation", [1, 2])
def test_rounds_equal_one_call(accumulation, wide_folder, data_file, tmp_path):
    config = sft_config("cosine", 2, accumulation)
    compare(wide_folder, data_file, tmp_path, config=config, peft=LORA, budget="steps", kwargs=NF4_BASE)


@needs_bitsandbytes
def test_adapters_over_it_are_bf16(wide_folder, data_file, tmp_path):
    session = SFTSession(settings_of(wide_folder, data_file), tmp_path)
    sent = session.snapshot()
    session.close()
    assert {value.dtype for value in sent.values()} == {torch.bfloat16}


ROUND_IN_A_PROCESS = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from tests.training.test_quantized import one_round, settings_of
from nvflare_llm_components.training.session import SFTSession
model, data, folder, number, given, sent = sys.argv[1:]
session = SFTSession(settings_of(Path(model), Path(data)), Path(folder))
save_file(one_round(session, int(number), load_file(given)), sent)
session.close()
"""


def one_round(session: SFTSession, number: int, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    session.begin_round(number, 3, bool)
    erase(session)
    session.load(given)
    report = session.train_round()
    sent = session.snapshot()
    session.keep(report, {}, session.present())
    session.settle()
    return sent


@needs_bitsandbytes
@pytest.mark.slow
def test_a_killed_site_goes_on_to_the_bits_of_one_call(wide_folder, data_file, tmp_path):
    settings = settings_of(wide_folder, data_file)
    total = {"max_steps": 3 * NUM_STEPS}
    expected, _ = centralized(
        wide_folder, data_file, tmp_path / "one", settings.sft_config, LORA, total, NF4_BASE
    )
    session = SFTSession(settings, tmp_path / "run")
    given = session.snapshot()
    for number in range(2):
        given = one_round(session, number, given)
    session.close()
    first, last = tmp_path / "first.safetensors", tmp_path / "last.safetensors"
    save_file(given, first)
    arguments = [wide_folder, data_file, tmp_path / "run", 2, first, last]
    command = [sys.executable, "-c", ROUND_IN_A_PROCESS, *map(str, arguments)]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while '"train", "step": 9, "round": 2' not in (tmp_path / "run" / "metrics.jsonl").read_text():
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not last.exists()
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert_same(load_file(last), expected)
