"""The mistakes that people make, and the sentence that each of them gets before anything runs."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from nvflare_llm_components.jobs.shipped import SHIPPED
from nvflare_llm_components.jobs.write import chosen, write_job
from nvflare_llm_components.tools.allow import allow
from nvflare_llm_components.tools.checks import machine
from nvflare_llm_components.tools.checks.check import check, show
from nvflare_llm_components.tools.checks.subject import Finding, note
from nvflare_llm_components.tools.policy import init_policy
from nvflare_llm_components.tools.run import run
from nvflare_llm_components.tools.shell import CommandError
from tests.tiny import save_tiny_model, write_rows, write_site_data

SITES = ["a", "b", "c"]
Config = dict[str, Any]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    save_tiny_model(folder / "model", max_position_embeddings=512)
    write_site_data(folder / "data", SITES)
    return folder


class Desk:
    """A job, a model, data of three sites, and a hand that makes a mistake."""

    def __init__(self, folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job, self.model, self.data = folder / "job", folder / "model", folder / "data"
        self.workspace: Path | None = None
        self.sites = list(SITES)
        shutil.copytree(prepared / "model", self.model)
        shutil.copytree(prepared / "data", self.data)
        self.environment = monkeypatch
        monkeypatch.setenv("NVFLARE_LLM_MODEL", str(self.model))
        monkeypatch.setenv("NVFLARE_LLM_DATA", str(self.data))
        self.write("sft_int8")

    def write(self, start: str, **choices: Any) -> None:
        shutil.rmtree(self.job, ignore_errors=True)
        write_job(chosen(start, choices), self.job)

    def edit(self, side: str, change: Callable[[Config], object]) -> None:
        name = "meta.json" if side == "meta" else f"app/config/config_fed_{side}.json"
        config = json.loads((self.job / name).read_text())
        change(config)
        (self.job / name).write_text(json.dumps(config, indent=2))

    def replace(self, side: str, old: str, new: str) -> None:
        file = self.job / f"app/config/config_fed_{side}.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    def executor(self, **args: Any) -> None:
        self.edit("client", lambda c: c["executors"][0]["executor"]["args"].update(args))

    def found(self) -> list[Finding]:
        return check(self.job, self.sites, self.workspace)


@pytest.fixture
def desk(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, prepared, monkeypatch)


def rows_of_b(desk: Desk, *rows: dict[str, object]) -> None:
    write_rows(desk.data / "b/training.jsonl", list(rows))


def small_disk(desk: Desk) -> None:
    usage = type("Usage", (), {"free": 1000})
    desk.environment.setattr(machine.shutil, "disk_usage", lambda place: usage)


def small_memory(desk: Desk) -> None:
    memory = type("Memory", (), {"available": 1000})
    desk.environment.setattr(machine.psutil, "virtual_memory", lambda: memory)


def not_allowed(desk: Desk) -> None:
    desk.workspace = desk.job.parent / "ws"
    (desk.workspace / "local").mkdir(parents=True)
    (desk.workspace / "local/resources.json").write_text("{}")


def lowest_policy(desk: Desk) -> None:
    desk.workspace = desk.job.parent / "ws"
    allow(desk.workspace, new=True)
    init_policy(desk.workspace, ["training.batch_size=1"])


def no_dequantizer(side: str, chain: str) -> Callable[[Desk], None]:
    return lambda desk: desk.edit(side, lambda config: config.update({chain: []}))


SCRIPT = {
    "path": "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor",
    "args": {"execution_mode": "external_process", "command": ["python", "train.py"]},
}
MISTAKES: dict[str, tuple[Callable[[Desk], object], str]] = {
    "model variable unset": (
        lambda d: d.environment.delenv("NVFLARE_LLM_MODEL"),
        "error NVFLARE_LLM_MODEL: expected it in the environment. Found it unset. Type: export",
    ),
    "data variable unset": (
        lambda d: d.environment.delenv("NVFLARE_LLM_DATA"),
        "error NVFLARE_LLM_DATA: expected it in the environment",
    ),
    "misspelt variable of the job": (
        lambda d: d.replace("client", '"{learning_rate}"', '"{learning_rte}"'),
        "'{learning_rte}' stands for a variable that the file does not define",
    ),
    "number from the environment": (
        lambda d: (
            d.environment.setenv("LR", "2e-5"),
            d.edit("client", lambda c: c.update(learning_rate="{$LR}")),
        ),
        "A value from the environment is text to FLARE: write the number in the JSON",
    ),
    "model folder misspelt": (
        lambda d: d.environment.setenv("NVFLARE_LLM_MODEL", str(d.model) + "x"),
        "model: expected a Hugging Face folder. Found nothing at",
    ),
    "model folder relative": (
        lambda d: (
            d.environment.chdir(d.model.parent),
            d.environment.setenv("NVFLARE_LLM_MODEL", "model"),
        ),
        "expected an absolute path, since each process has its own working folder. Found model",
    ),
    "model without safetensors": (
        lambda d: (d.model / "model.safetensors").rename(d.model / "pytorch_model.bin"),
        "a, b, c, server: model: expected safetensors in",
    ),
    "model without tokenizer": (
        lambda d: [file.unlink() for file in d.model.glob("tokenizer*")],
        "model: expected a tokenizer in",
    ),
    "training file missing at one site": (
        lambda d: (d.data / "b/training.jsonl").unlink(),
        "error b: train_data: expected a data file, found nothing at",
    ),
    "validation file missing at one site": (
        lambda d: (d.data / "c/validation.jsonl").unlink(),
        "error c: eval_data: expected a data file, found nothing at",
    ),
    "columns of another kind": (
        lambda d: rows_of_b(d, {"question": "?", "answer": "!"}),
        "Its columns: question, answer.",
    ),
    "a row without text": (
        lambda d: rows_of_b(d, {"input": "?", "output": "!"}, {"input": "?", "output": None}),
        "row 2: expected text in column 'output', found NoneType",
    ),
    "a line that is no JSON": (
        lambda d: (d.data / "b/training.jsonl").write_text('{"input": "?", "output": "!"}\n{oops\n'),
        "row 2: expected JSON, found it unreadable",
    ),
    "an empty file": (
        lambda d: (d.data / "b/training.jsonl").write_text(""),
        "error b: train_data: expected at least one row, found an empty file",
    ),
    "messages without a chat template": (
        lambda d: rows_of_b(
            d,
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
        ),
        "error b: expected a model with a chat template, for rows of messages",
    ),
    "unknown setting": (
        lambda d: d.executor(sft_config={"learnin_rate": 1e-4}),
        "sft_config.learnin_rate: it is not among",
    ),
    "both budgets": (
        lambda d: d.executor(local_steps=5),
        "local_steps and local_epochs: expected one of them",
    ),
    "another adapter on the server": (
        lambda d: (
            d.write("peft_lora"),
            d.edit("server", lambda c: c["peft_config"].update(r=16)),
        ),
        "peft_config: the server's and that of a should be equal. Found r: 16 and 8",
    ),
    "an adapter on one side": (
        lambda d: (d.write("peft_lora"), d.executor(peft_config=None)),
        "Found one on the server and none at the site",
    ),
    "an adapter that fits no module": (
        lambda d: d.write("peft_lora", lora={"target_modules": ["qkv"]}),
        "peft_config or model: Target modules",
    ),
    "another precision on one side": (
        lambda d: d.edit("client", lambda c: c.update(precision="fp32")),
        "warning precision: expected one for all. Found server int8, a fp32",
    ),
    "4 bits without changes": (
        lambda d: [d.edit(side, lambda c: c.update(precision="nf4")) for side in ("server", "client")],
        "nf4 wants params_type DIFF and error_feedback",
    ),
    "rounded weights": (
        lambda d: d.executor(params_type="FULL"),
        "whole weights at int8 lose what a round changes by less than half a step of the rounding",
    ),
    "rounded weights of a script": (
        lambda d: d.edit("client", lambda c: c["executors"][0].update(executor=SCRIPT)),
        "half a step of the rounding. Set params_transfer_type to DIFF",
    ),
    "rounded weights from site to site": (
        lambda d: d.write("sft_swarm", precision="int8"),
        "of the rounding. Set precision to fp32",
    ),
    "rounded weights by an override": (
        lambda d: d.write("sft", overrides={"mlp": "bf16"}) or d.executor(params_type="FULL"),
        "whole weights at bf16 lose",
    ),
    "changes where weights are averaged": (
        lambda d: d.write("sft_scatter_and_gather") or d.executor(params_type="DIFF"),
        "expected_data_kind of InTimeAccumulateWeightedAggregator: expected WEIGHT_DIFF, which a sends",
    ),
    "weights where changes are averaged": (
        lambda d: d.write("sft_fedopt") or d.executor(params_type="FULL"),
        "expected_data_kind of InTimeAccumulateWeightedAggregator: expected WEIGHTS, which a sends",
    ),
    "server's dequantizer missing": (
        no_dequantizer("server", "task_result_filters"),
        "task_result_filters of server: expected PrecisionDequantizeFilter for get_weights, submit_model",
    ),
    "client's dequantizer missing": (
        no_dequantizer("client", "task_data_filters"),
        "task_data_filters of a: expected PrecisionDequantizeFilter",
    ),
    "a star for tasks": (
        lambda d: d.edit("server", lambda c: c["task_data_filters"][0].update(tasks=["*"])),
        "FLARE compares task names exactly, and '*' is none",
    ),
    "three of five sites": (
        lambda d: (
            d.sites.extend(["d", "e"]),
            write_site_data(d.data, ["d", "e"]),
        ),
        "warning num_clients: each round is given to 3 of the 5 sites, drawn at random",
    ),
    "fewer sites than the job wants": (
        lambda d: d.sites.remove("c"),
        "error num_clients: the job gives each round to 3 sites. Found 2",
    ),
    "FLARE would wait for more sites": (
        lambda d: d.sites.remove("c"),
        "meta.json: min_clients is 3, and there are 2 sites: the job would wait for ever",
    ),
    "a site twice": (lambda d: d.sites.append("a"), "sites: expected different names. Found a twice"),
    "a quorum that can't be": (
        lambda d: d.edit("server", lambda c: c.update(quorum=4)),
        "server: QuorumFedAvg: quorum: expected 1 to num_clients=3, found 4",
    ),
    "an argument misspelt": (
        lambda d: d.replace("server", '"args": {"precision": ', '"args": {"presicion": '),
        "PrecisionQuantizeFilter: got an unexpected keyword argument 'presicion'",
    ),
    "a component of ours that is none": (
        lambda d: d.replace("server", "widgets.RoundLog", "widgets.RoundLogger"),
        "nvflare_llm_components.widgets.RoundLogger: it is not a component of this package",
    ),
    "the workspace allows nothing": (
        not_allowed,
        "the site's class_allow_list does not have it. Type: nvflare-llm allow",
    ),
    "the site's policy has a lower ceiling": (
        lowest_policy,
        "sft_config.per_device_train_batch_size: this site's policy expects at most 1, found 4",
    ),
    "FedOpt's optimizer is not allowed": (
        lambda d: d.write("sft_fedopt"),
        "torch.optim.SGD: the site's class_allow_list does not have it",
    ),
    "rows longer than the model": (
        lambda d: d.write("sft", max_length=1024),
        "max_length is 1024, and the model has 512 positions",
    ),
    "fewer rows than a batch that must be full": (
        lambda d: d.write("sft", batch_size=64, sft={"dataloader_drop_last": True}),
        "expected 64 rows, a whole batch",
    ),
    "another model on the server": (
        lambda d: (
            save_tiny_model(d.model.parent / "other", hidden_size=64),
            d.edit("server", lambda c: c.update(model=str(d.model.parent / "other"))),
        ),
        "model: the server's and that of a should have the same shape",
    ),
    "too little disk": (small_disk, "free for models and training states. Found 0.0 GB"),
    "too little memory": (small_memory, "sites on this machine want about"),
}


def test_a_sound_job_has_no_error_and_says_what_it_will_do(desk: Desk):
    found = desk.found()
    assert {finding.level for finding in found} == {"note"}
    text = " ".join(finding.sentence for finding in found)
    assert "a: 12 rows, 3 steps in the first of 3 rounds, 9 in all" in text
    assert "bytes (int8, 27,040 of 27,040 weights)" in text


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_rows_of_any_format_are_counted_and_held_against_the_model(desk: Desk, suffix: str):
    answer = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    path = desk.data / f"own{suffix}"
    rows = datasets.Dataset.from_list([{"messages": answer}] * 8)
    rows.to_parquet(path) if suffix == ".parquet" else path.write_text(json.dumps(rows.to_list()))
    desk.executor(train_data=str(path))
    found = [each.sentence for each in desk.found()]
    assert any("a: 8 rows, 2 steps" in each for each in found), found
    assert any("expected a model with a chat template" in each for each in found), found


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_said(desk: Desk, mistake: str):
    make, sentence = MISTAKES[mistake]
    make(desk)
    found = [f"{each.level} {each.sentence}" for each in desk.found() if each.level != "note"]
    assert any(sentence in each for each in found), found


# `run` says these, allows what it is to run, and goes on.
GOES_ON = {
    "another precision on one side",
    "4 bits without changes",
    "rounded weights",
    "rounded weights of a script",
    "rounded weights from site to site",
    "rounded weights by an override",
    "three of five sites",
    "rows longer than the model",
    "the workspace allows nothing",
    "too little memory",
}


@pytest.mark.parametrize("mistake", [mistake for mistake in MISTAKES if mistake not in GOES_ON])
def test_run_starts_no_job_with_the_mistake_and_its_last_line_is_an_error_of_it(desk: Desk, mistake: str):
    make, sentence = MISTAKES[mistake]
    make(desk)
    workspace, console = desk.workspace or desk.job.parent / "ws", Console(file=io.StringIO(), width=2000)
    with pytest.raises(CommandError) as error:
        run(desk.job, workspace, desk.sites, console=console)
    last = str(error.value).splitlines()[-1]
    errors = [line for line in console.file.getvalue().splitlines() if line.startswith("error")]
    assert last == errors[0].removeprefix("error").strip()
    assert sentence.removeprefix("error ") in (last if len(errors) == 1 else console.file.getvalue())
    assert not (workspace / "server").exists()


def test_the_columns_of_ones_own_file_are_named(desk: Desk):
    rows_of_b(desk, {"question": "?", "answer": "!"})
    (found,) = [each.sentence for each in desk.found() if each.level == "error"]
    assert "expected columns input and output, prompt and completion, messages, or text" in found
    assert found.endswith("Its columns: question, answer.")


def test_paths_in_a_job_must_lie_where_the_site_lets_jobs_read(desk: Desk):
    desk.write("sft", model=str(desk.model), data=str(desk.data))
    assert {each.level for each in desk.found()} == {"note"}
    desk.environment.delenv("NVFLARE_LLM_DATA")
    assert any("NVFLARE_LLM_DATA" in each.sentence for each in desk.found() if each.level == "error")


def test_a_job_of_the_filters_alone_is_checked_as_far_as_it_is_ours(desk: Desk):
    stock = {"tasks": ["train"], "executor": {"path": "nvflare.app_common.np.np_trainer.NPTrainer"}}
    desk.edit("client", lambda config: config.update(executors=[stock]))
    desk.edit("client", lambda config: config["task_result_filters"][0].update(tasks=["train"]))
    assert [each.sentence for each in desk.found() if each.level == "error"] == []
    assert any("none is HFSFTExecutor" in each.sentence for each in desk.found())
    with pytest.raises(
        CommandError, match=r"Found none\. Type: .* nvflare simulator \S+ -w \S+ -c a,b,c -t 3"
    ):
        run(desk.job, desk.job.parent / "ws", desk.sites, console=Console(quiet=True))
    desk.edit("server", lambda config: config.update(task_result_filters=[]))
    assert any("task_result_filters of server" in each.sentence for each in desk.found())
    desk.edit("client", lambda config: config.update(executors=[]))
    assert sum("expected an executor" in each.sentence for each in desk.found()) == 3


def test_json_with_a_fault_is_one_error(desk: Desk):
    (desk.job / "app/config/config_fed_client.json").write_text('{"model": 1,}')
    with pytest.raises(ValueError, match=r"config_fed_client\.json: expected a JSON object. Found"):
        desk.found()


def test_a_folder_that_is_no_job_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a job folder"):
        check(tmp_path, SITES)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_jobs_pass(desk: Desk, name: str):
    desk.write(name)
    found = check(desk.job, SITES, also=["torch.optim.SGD"])
    assert [each for each in found if each.level != "note"] == []


def test_what_allow_wrote_is_enough(desk: Desk):
    desk.workspace = desk.job.parent / "ws"
    allow(desk.workspace, new=True)
    assert {each.level for each in desk.found()} == {"note"}


def test_values_of_any_kind_in_a_job_end_in_findings_and_in_no_traceback(desk: Desk):
    """A job comes from elsewhere: whatever stands in a place, the check says something and goes on."""
    for value in (None, 3, "x", [], [1], {}, {"path": 1}):
        for key in ("workflows", "components", "task_data_filters", "server"):
            desk.write("peft_lora")
            desk.edit("server", lambda config, k=key, v=value: config.update({k: v}))
            desk.found()
        for key in ("executors", "task_result_filters", "peft_config", "precision"):
            desk.write("peft_lora")
            desk.edit("client", lambda config, k=key, v=value: config.update({k: v}))
            desk.found()


def test_errors_are_shown_last_and_counted(desk: Desk):
    console = Console(file=io.StringIO(), width=200)
    assert show([note("fine")], console)
    assert console.file.getvalue().splitlines()[-1] == "Nothing stands in the way."
    (desk.data / "b/training.jsonl").unlink()
    assert not show(desk.found(), console)
    assert re.fullmatch(r"1 error", console.file.getvalue().splitlines()[-1])
