import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.jobs.choices import JobChoices
from nvflare_llm_components.jobs.read import resolved
from nvflare_llm_components.jobs.shipped import SHIPPED
from nvflare_llm_components.jobs.validate import checked
from nvflare_llm_components.jobs.write import chosen, describe, to_toml, write_job, write_toml

CHOICES = st.builds(
    JobChoices,
    model=st.text(min_size=1, max_size=20).filter(str.isprintable),
    sites=st.sampled_from(["2", "a,b", "site-1, x.y"]),
    rounds=st.integers(1, 99),
    precision=st.sampled_from(["fp32", "int8", "nf4", "int2"]),
    quorum=st.none() | st.integers(1, 2),
    lora=st.dictionaries(st.sampled_from(["r", "lora_alpha"]), st.integers(1, 64)),
    lr=st.floats(1e-6, 1e-2),
    local_steps=st.none() | st.integers(1, 50),
    average=st.sampled_from(["mean", "ordered", "median"]),
    executor=st.dictionaries(st.just("num_processes"), st.integers(1, 4)),
    sft=st.dictionaries(st.sampled_from(["warmup_steps", "seed"]), st.integers(0, 9)),
)


def executor(job: Path, site: str) -> dict:
    return resolved(job, "client", site)["executors"][0]["executor"]["args"]


@given(choices=CHOICES)
@settings(deadline=None)
def test_toml_gives_the_choices_back(choices: JobChoices, tmp_path_factory):
    file = tmp_path_factory.mktemp("toml") / "choices.toml"
    write_toml(checked(choices), file)
    assert chosen(str(file), {}) == choices


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_job_survives_its_toml(name: str, tmp_path: Path):
    (tmp_path / "a.toml").write_text(to_toml(SHIPPED[name]))
    assert chosen(str(tmp_path / "a.toml"), {}) == SHIPPED[name]


def test_toml_may_start_from_a_shipped_job_and_options_come_last(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text('start = "peft_lora_int8"\nsites = 5\nlr = 1\n[lora]\nr = 32\n')
    choices = chosen(str(file), {"lr": 2e-5, "lora": {"lora_alpha": 64}})
    assert (choices.precision, choices.sites, choices.lr) == ("int8", "5", 2e-5)
    assert choices.peft_config["r"] == 32
    assert choices.peft_config["lora_alpha"] == 64
    assert choices.peft_config["target_modules"] == "all-linear"


def test_averages_and_further_arguments_reach_their_component(tmp_path: Path):
    own = {
        "average": "trimmed-mean",
        "average_settings": {"num_trimmed": 2},
        "executor": {"num_processes": 2},
    }
    write_job(chosen("sft", own), tmp_path / "job")
    aggregator = resolved(tmp_path / "job", "server")["workflows"][0]["args"]["aggregator"]
    assert aggregator["path"].endswith(".TrimmedMean")
    assert aggregator["args"] == {"num_trimmed": 2}
    assert executor(tmp_path / "job", "site-1")["num_processes"] == 2


def test_a_site_with_settings_of_its_own_gets_an_app_of_its_own(tmp_path: Path):
    job = tmp_path / "job"
    own = {"site-3.batch_size": 2, "site-3.local_steps": 7, "site-2.model": "/other"}
    write_job(chosen("sft", {"sites": "3", "per_site": own}), job)
    assert json.loads((job / "meta.json").read_text())["deploy_map"] == {
        "app": ["server", "site-1"],
        "app_site-2": ["site-2"],
        "app_site-3": ["site-3"],
    }
    assert executor(job, "site-1")["sft_config"]["per_device_train_batch_size"] == 4
    assert executor(job, "site-3")["sft_config"]["per_device_train_batch_size"] == 2
    assert executor(job, "site-3")["local_steps"] == 7
    assert "local_epochs" not in executor(job, "site-3")
    assert executor(job, "site-2")["model_name_or_path"] == "/other"


def test_all_sites_train_unless_a_quorum_says_otherwise(tmp_path: Path):
    choices = chosen("sft_int8", {"sites": "5"})
    write_job(choices, tmp_path / "five")
    write_job(replace(choices, quorum=4), tmp_path / "four")
    five, four = (resolved(tmp_path / name, "server")["workflows"][0]["args"] for name in ("five", "four"))
    assert (five["num_clients"], five["quorum"]) == (5, None)
    assert (four["num_clients"], four["quorum"], four["grace_s"]) == (5, 4, 600)
    assert json.loads((tmp_path / "four/meta.json").read_text())["min_clients"] == 4


@pytest.mark.parametrize(
    ("start", "given", "sentence"),
    [
        ("sft_int4", {}, "start: expected one of sft,"),
        ("nowhere.toml", {}, "nowhere.toml"),
        ("sft", {"learning_rate": 1.0}, "learning_rate: expected one of model, data"),
        ("sft", {"rounds": "3"}, "rounds: expected int"),
        ("sft", {"rounds": True}, "rounds: expected int"),
        ("sft", {"lora": 3}, "lora: expected dict"),
        ("sft", {"per_site": {"batch_size": 2}}, "per_site: expected one of the sites"),
    ],
)
def test_what_is_no_choice_is_refused(start: str, given: dict, sentence: str):
    with pytest.raises((ValueError, OSError)) as error:
        chosen(start, given)
    assert sentence in str(error.value)


def test_toml_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "a.toml").write_text("rounds = \n")
    with pytest.raises(ValueError, match=r"a\.toml: expected TOML"):
        chosen(str(tmp_path / "a.toml"), {})


def test_a_folder_is_not_overwritten(tmp_path: Path):
    with pytest.raises(FileExistsError, match="expected no such folder"):
        write_job(JobChoices(), tmp_path)


def test_what_was_chosen_is_said():
    sentence = describe(chosen("peft_lora_int8", {"sites": "a,b", "rounds": 9, "quorum": 1}))
    for part in (
        "2 sites (a, b)",
        "9 rounds",
        "LORA 8",
        "int8 messages",
        "goes on with 1 results after 600 s",
    ):
        assert part in sentence
