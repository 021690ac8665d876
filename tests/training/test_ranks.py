"""Several processes a site: the same bits as torchrun, and no process that outlives its site."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from nvflare_llm_components.training import weights
from nvflare_llm_components.training.group import LocalRank, processes_for
from nvflare_llm_components.training.ranks import RankError, Ranks
from nvflare_llm_components.training.session import SFTSession
from nvflare_llm_components.training.settings import TrainingSettings
from nvflare_llm_components.training.worker import TrainingStoppedError
from tests.tiny import tiny_tokenizer
from tests.training.conftest import LORA, NF4_BASE, NUM_ROWS, SFT, needs_bitsandbytes

ROOT = Path(__file__).parents[2]
NUM_ROUNDS = 3
WAIT_S = 60
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = {
    "sft": ({}, None, {"local_epochs": 1}, {"num_train_epochs": 3}),
    "sft-accumulation-cosine": (
        {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        None,
        {"local_epochs": 1.5},
        {"num_train_epochs": 4.5},
    ),
    "lora": ({"lr_scheduler_type": "cosine"}, LORA, {"local_steps": 2}, {"max_steps": 6}),
    "lora-accumulation": (
        {"gradient_accumulation_steps": 2},
        LORA,
        {"local_epochs": 1},
        {"num_train_epochs": 3},
    ),
    "qlora": ({"lr_scheduler_type": "cosine"}, LORA, {"local_steps": 2}, {"max_steps": 6}),
    "qlora-accumulation": (
        {"gradient_accumulation_steps": 2},
        LORA,
        {"local_epochs": 1},
        {"num_train_epochs": 3},
    ),
}
"""Of all the model's attention has dropout, of adapters their own as well; all are killed and resumed."""
MODEL_KWARGS = {"qlora": NF4_BASE, "qlora-accumulation": NF4_BASE}


def settings_of(model: Path, data: Path, case: str = "sft", **changes: Any) -> TrainingSettings:
    sft, peft, budget, _ = CASES[case]
    arguments: dict[str, Any] = {
        "num_processes": 2,
        "eval_data": data,
        "model_kwargs": MODEL_KWARGS.get(case, {}),
        **budget,
        **changes,
    }
    return TrainingSettings(
        model_name_or_path=str(model), train_data=data, sft_config=SFT | sft, peft_config=peft, **arguments
    )


def torchrun(
    case: str, sharding: str, model: Path, data: Path, out: Path
) -> tuple[weights.StateDict, weights.StateDict, list]:
    """First and last weights, and the curve, of one uninterrupted call of two processes."""
    out.mkdir()
    sft, peft, _, total = CASES[case]
    shards = {"distributed_config": {"fsdp_size": 2}} if sharding == "full" else {}
    kwargs = MODEL_KWARGS.get(case, {}) | shards
    options = [*map(json.dumps, (SFT | sft, peft, total, kwargs))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.training.plain_ranks", str(model), str(data), str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300, capture_output=True)
    first, last = (load_file(out / f"{name}.safetensors") for name in ("first", "last"))
    return first, last, json.loads((out / "losses.json").read_text())


def pids_of(session: SFTSession) -> list[int]:
    assert isinstance(session._engine, Ranks)
    return [rank.process.pid for rank in session._engine._group.ranks if isinstance(rank, LocalRank)]


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + WAIT_S
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if is_running(pid)]
        time.sleep(0.01)


def one_round(session: SFTSession, number: int, given: weights.StateDict) -> weights.StateDict:
    session.load(given)
    session.begin_round(number, NUM_ROUNDS, bool, first_round=0)
    metrics = session.evaluate()
    report = session.train_round()
    sent = session.snapshot()
    session.keep(report, metrics, session.present())
    session.settle()
    return sent


def train_but_kill(session: SFTSession, number: int, given: weights.StateDict, *victims: int) -> None:
    """Rank 1, or whoever is named, dies in the middle of the round, after its first step."""
    session.load(given)
    session.begin_round(number, NUM_ROUNDS, bool, first_round=0)
    victims = victims or (pids_of(session)[1],)
    write = session._metrics.write

    def kill(kind: str, **values: Any) -> None:
        for victim in victims:
            os.kill(victim, signal.SIGKILL)

    session._metrics.write = kill  # type: ignore[method-assign]
    try:
        session.train_round()
    finally:
        session._metrics.write = write  # type: ignore[method-assign]


def curve_of(folder: Path) -> list[list[float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[line["step"], line["loss"], line["learning_rate"]] for line in lines if line["kind"] == "train"]


@needs_two_cores
@pytest.mark.parametrize(
    ("case", "sharding"),
    [
        ("sft", "none"),
        *(
            pytest.param(case, sharding, marks=pytest.mark.slow)
            for sharding in ("none", "full")
            for case in CASES
            if case not in MODEL_KWARGS and (case, sharding) != ("sft", "none")
        ),
        *(pytest.param(case, "none", marks=[needs_bitsandbytes, pytest.mark.slow]) for case in MODEL_KWARGS),
    ],
)
def test_two_processes_also_killed_and_resumed_are_one_torchrun(
    case, sharding, model_folder, data_file, tmp_path
):
    given, expected, curve = torchrun(case, sharding, model_folder, data_file, tmp_path / "torchrun")
    settings, folder = settings_of(model_folder, data_file, case, sharding=sharding), tmp_path / "run"
    session = SFTSession(settings, folder)
    for number in range(2):
        given = one_round(session, number, given)
    pids = pids_of(session)
    started = time.monotonic()
    with pytest.raises(RankError, match="Rank 1 of 2 was killed by SIGKILL"):
        train_but_kill(session, 2, given)
    assert time.monotonic() - started < 10
    wait_until_gone(pids)
    with pytest.raises(RankError, match="Rank 1 of 2 was killed by SIGKILL"):
        session._engine.evaluate()
    session.close()

    session = SFTSession(settings, folder)
    found = one_round(session, 2, given)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    assert curve_of(folder) == curve

    pids = pids_of(session)
    session.begin_round(3, NUM_ROUNDS, lambda: True, first_round=0)
    started = time.monotonic()
    with pytest.raises(TrainingStoppedError):
        session.train_round()
    session.close()
    assert time.monotonic() - started < 5
    wait_until_gone(pids)


SITE = """
import sys
from pathlib import Path
from tests.training.test_ranks import pids_of, settings_of
from nvflare_llm_components.training.session import SFTSession
model, data, folder = map(Path, sys.argv[1:])
session = SFTSession(settings_of(model, data, local_epochs=None, local_steps=10**6), folder)
print(*pids_of(session), flush=True)
session.begin_round(0, 1, bool)
session.train_round()
"""


@needs_two_cores
def test_no_rank_outlives_a_killed_site(model_folder, data_file, tmp_path):
    command = [sys.executable, "-c", SITE, str(model_folder), str(data_file), str(tmp_path)]
    site = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL, cwd=ROOT)
    assert site.stdout
    pids = [int(pid) for pid in site.stdout.readline().split()]
    assert len(pids) == 2
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or '"train"' not in metrics.read_text():
        assert site.poll() is None
        time.sleep(0.01)
    site.kill()
    site.wait()
    site.stdout.close()
    wait_until_gone(pids)


@needs_two_cores
@pytest.mark.slow
def test_a_rank_that_fails_is_named_with_its_traceback(model_folder, tmp_path, caplog):
    settings = settings_of(model_folder, tmp_path / "nowhere.jsonl")
    with (
        pytest.raises(RankError, match=r"of 2 failed: MissingFileError: .*nowhere\.jsonl"),
        caplog.at_level("WARNING"),
    ):
        SFTSession(settings, tmp_path)
    assert "in load_rows" in caplog.text


@needs_two_cores
@pytest.mark.slow
def test_what_cannot_be_sharded_is_refused_by_name(model_folder, data_file, tmp_path):
    config = MixtralConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    experts = tmp_path / "experts"
    AutoModelForCausalLM.from_config(config).save_pretrained(experts)
    tiny_tokenizer().save_pretrained(experts)
    with pytest.raises(RankError, match="sharding: expected 'none' for mixtral"):
        SFTSession(settings_of(experts, data_file, sharding="full"), tmp_path / "run")
    session = SFTSession(settings_of(model_folder, data_file, sharding="full"), tmp_path / "fedprox")
    session.begin_round(0, 1, bool)
    with pytest.raises(RankError, match="sharding: expected 'none' for FedProx"):
        session.train_round(proximal_mu=0.1)
    session.close()


@needs_two_cores
@pytest.mark.slow
def test_another_number_of_processes_goes_on_from_the_weights(model_folder, data_file, tmp_path, caplog):
    first = SFTSession(settings_of(model_folder, data_file), tmp_path)
    sent = one_round(first, 0, first.snapshot())
    first.close()
    with caplog.at_level(logging.WARNING):
        again = SFTSession(settings_of(model_folder, data_file, num_processes=1), tmp_path)
    assert "one of 2 processes, and 1 train here now" in caplog.text
    one_round(again, 1, sent)
    again.close()
    rate = curve_of(tmp_path)[-1][2]
    assert rate == pytest.approx(SFT["learning_rate"] * (1 - 9 / 15))


@needs_two_cores
@pytest.mark.slow
def test_rows_that_fill_up_a_batch_count_once(model_folder, data_file, tmp_path):
    session = SFTSession(settings_of(model_folder, data_file), tmp_path)
    session.begin_round(0, 1, bool)
    assert session.train_round().num_examples == NUM_ROWS
    session.close()


@pytest.mark.parametrize("number", [0, -1, "two", 1.5, True])
def test_a_number_of_processes_that_is_none_is_refused(number, model_folder, data_file):
    with pytest.raises(ValueError, match="num_processes"):
        settings_of(model_folder, data_file, num_processes=number).checked()


def test_more_processes_than_devices_are_refused(model_folder, data_file):
    with pytest.raises(ValueError, match=r"num_processes: expected 1000 .*, found"):
        processes_for(settings_of(model_folder, data_file, num_processes=1000))


def test_auto_is_one_process_where_there_is_no_gpu(model_folder, data_file):
    settings = settings_of(model_folder, data_file, num_processes="auto")
    assert processes_for(replace(settings, sft_config={"use_cpu": True})) == 1
