"""Jobs that attack the site that runs them: what was tried, who refused it, and with which words.

Through the executor itself: each is answered with an error code, within seconds, before anything is built;
the refusal stands in FLARE's audit log, and neither a file of the site nor a row of it in the answer.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.fuel.sec.audit import AuditService

from nvflare_llm_components import executors
from nvflare_llm_components.executors import HFSFTExecutor, accepted
from nvflare_llm_components.flare.headers import ERROR_HEADER
from nvflare_llm_components.policy.site import POLICY_FILE
from nvflare_llm_components.tensors.errors import ReportableError
from tests.tasks import SFT, result, task, weights_of
from tests.tiny import save_tiny_model, write_rows

SECRET = "Jane Doe, diabetes"
Arguments = dict[str, Any]


@pytest.fixture
def site(tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit whose environment names one model and one folder of data, beside what no job may see."""
    monkeypatch.setenv("NVFLARE_LLM_MODEL", str(model))
    monkeypatch.setenv("NVFLARE_LLM_DATA", str(data.parent))
    (tmp_path / "job/app_site-1").mkdir(parents=True)
    write_rows(tmp_path / "secret/rows.jsonl", [{"text": SECRET}])
    save_tiny_model(tmp_path / "secret/model", seed=9)
    return tmp_path


@pytest.fixture
def audited(site: Path):
    AuditService.close()
    AuditService.initialize(str(site / "audit.log"))
    yield lambda: (site / "audit.log").read_text()
    AuditService.close()


def app(site: Path) -> Path:
    return site / "job/app_site-1"


def policy(site: Path, text: str) -> Arguments:
    (site / "local" / POLICY_FILE).write_text(text)
    return {}


def link(site: Path) -> Arguments:
    (app(site) / "linked.jsonl").symlink_to(site / "secret/rows.jsonl")
    return {"train_data": "linked.jsonl"}


def brought(site: Path, change: Callable[[Path], object]) -> Arguments:
    change(save_tiny_model(app(site) / "model", seed=3))
    return {"model_name_or_path": "model"}


def script(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("import os; os.system('touch /tmp/pwned')")


def template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for a in range(10**9) %}{% endfor %}")


def edited(name: str, **values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))

    return change


def elsewhere(folder: Path) -> None:
    """Weights that are another model's: the index says where."""
    names = weights_of(folder)
    (folder / "model.safetensors").unlink()
    secret = folder.parents[2] / "secret/model/model.safetensors"
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, str(secret))})
    )


def doubled(folder: Path) -> None:
    step = {"type": "Replace", "pattern": {"String": "1"}, "content": "11"}
    edited("tokenizer.json", normalizer={"type": "Sequence", "normalizers": [step] * 28})(folder)


def conversation(site: Path) -> Arguments:
    """As many answers as fit: each is a row of its own, with all that was before it."""
    turn = {"role": "assistant", "content": ""}
    write_rows(app(site) / "rows.jsonl", [{"messages": [turn] * 20_000}])
    return {"train_data": "rows.jsonl"}


HOSTILE: dict[str, tuple[Callable[[Path], Arguments], str]] = {
    # the machine
    "a model that its files do not bear out": (
        lambda s: brought(s, edited("config.json", intermediate_size=2**20)),
        "expected sizes that its weights bear out, found a model of",
    ),
    "a model that is too large": (
        lambda s: policy(s, "[limits]\nmodel_gib = 0.00001"),
        "model_name_or_path: this site's policy expects weights of at most 1e-05 GiB once loaded",
    ),
    "a model that is too large with its adapter": (
        lambda s: (
            policy(s, "[limits]\nmodel_gib = 0.001") | {"peft_config": {"peft_type": "LORA", "r": 4096}}
        ),
        "model_name_or_path: this site's policy expects weights of at most 0.001 GiB once loaded",
    ),
    "too many processes": (
        lambda s: policy(s, "[limits]\nprocesses = 1") | {"num_processes": 2},
        "num_processes: this site's policy expects at most 1, found 2",
    ),
    "a disk that is nearly full": (
        lambda s: policy(s, "[limits]\nfree_disk_gib = 1e12"),
        "disk of the run directory: this site's policy expects at least 1e+12 GiB free",
    ),
    # reading
    "a file of the system": (lambda s: {"train_data": "/etc/passwd"}, "train_data: expected what this site"),
    "the environment": (
        lambda s: {"train_data": "/proc/self/environ"},
        "train_data: expected what this site",
    ),
    "evaluation data": (
        lambda s: {"eval_data": str(s / "secret/rows.jsonl")},
        "eval_data: expected what this",
    ),
    "dots": (lambda s: {"train_data": "../../secret/rows.jsonl"}, "train_data: expected what this site"),
    "a link in the app": (link, "train_data"),
    "another model": (
        lambda s: {"model_name_or_path": str(s / "secret/model")},
        "model_name_or_path: expected",
    ),
    "another job's model": (
        lambda s: {"model_name_or_path": str(s / "job-0/global_model/last")},
        "model_name_or",
    ),
    "the hub": (
        lambda s: {"model_name_or_path": "evil/model"},
        "model_name_or_path: expected what this site",
    ),
    "a URL": (lambda s: {"model_name_or_path": "https://evil/model"}, "model_name_or_path: expected what"),
    "an index that names another model": (
        lambda s: brought(s, elsewhere),
        "weight_map: expected names of files beside it",
    ),
    "an adapter that chooses its base": (
        lambda s: brought(s, edited("adapter_config.json", base_model_name_or_path="/secret")),
        "would choose the model to load",
    ),
    "a tokenizer that reads a file": (
        lambda s: brought(s, edited("tokenizer_config.json", vocab_file="/etc/passwd")),
        "found vocab_file in it",
    ),
    # running
    "a script in the model": (lambda s: brought(s, script), "found modeling_evil.py"),
    "a template that never ends": (lambda s: brought(s, template), "found chat_template.jinja"),
    "a regular expression that never ends": (
        lambda s: brought(s, edited("tokenizer.json", pre_tokenizer={"pattern": {"Regex": "(a+)+$"}})),
        "found a regular expression",
    ),
    "a kernel of the hub": (
        lambda s: {"model_kwargs": {"attn_implementation": "org/kernel"}},
        "model_kwargs.attn_implementation: expected 'eager'",
    ),
    "a kernel of the hub in config.json": (
        lambda s: brought(s, edited("config.json", attn_implementation="org/kernel")),
        "could download a kernel",
    ),
    "remote code": (lambda s: {"model_kwargs": {"trust_remote_code": True}}, "a job may not bring code"),
    "an import by name": (
        lambda s: {"peft_config": {"peft_type": "LORA", "megatron_core": "os"}},
        "megatron_core",
    ),
    "a compiler": (lambda s: {"sft_config": {"torch_compile": True}}, "it starts compilers"),
    "the hub as a place to publish": (lambda s: {"sft_config": {"push_to_hub": True}}, "push_to_hub"),
    "another tracker": (lambda s: {"sft_config": {"report_to": "wandb"}}, "report_to"),
    "another place to write": (lambda s: {"sft_config": {"output_dir": "/etc"}}, "output_dir"),
    "another template": (
        lambda s: {"sft_config": {"chat_template_path": "/etc/passwd"}},
        "chat_template_path",
    ),
    "another end of text": (lambda s: {"sft_config": {"eos_token": "<end>"}}, "eos_token"),
    # taking all there is
    "rows that grow without end": (conversation, "train_data: '"),
    "a tokenizer that doubles and doubles": (
        lambda s: brought(s, doubled),
        "tokenizer.json: normalizer: expected lists of at most 8",
    ),
    "a hundred million labels": (lambda s: brought(s, edited("config.json", num_labels=10**8)), "num_labels"),
    "a million layers": (
        lambda s: brought(s, edited("config.json", num_hidden_layers=10**6)),
        "num_hidden_layers",
    ),
    "a vocabulary of a thousand million": (
        lambda s: brought(s, edited("config.json", vocab_size=10**9)),
        "vocab_size",
    ),
    "two hundred workers": (
        lambda s: {"sft_config": {"dataloader_num_workers": 200}},
        "dataloader_num_workers",
    ),
    "pads without end": (lambda s: {"sft_config": {"pad_to_multiple_of": 10**9}}, "pad_to_multiple_of"),
    "a round without end": (lambda s: {"local_steps": 10**9}, "executor.local_steps"),
    "no number": (lambda s: {"sft_config": {"weight_decay": float("nan")}}, "sft_config.weight_decay"),
    "a pattern without end": (
        lambda s: {"peft_config": {"peft_type": "LORA", "target_modules": "(a+)+$"}},
        "peft_config.target_modules",
    ),
    # beyond the site's own policy
    "longer rows": (
        lambda s: policy(s, "[training]\nmax_length = 32") | {"sft_config": SFT},
        "sft_config.max_length: this site's policy expects at most 32, found 64",
    ),
    "rows without an end": (
        lambda s: policy(s, "[training]\nmax_length = 32") | {"sft_config": {"max_length": None}},
        "sft_config.max_length: this site's policy expects at most 32, found None",
    ),
    "larger batches": (lambda s: policy(s, "[training]\nbatch_size = 2"), "per_device_train_batch_size"),
    "more steps": (
        lambda s: policy(s, "[training]\nsteps = 2") | {"local_epochs": 50},
        "at most 2 steps a round",
    ),
    "more rounds": (
        lambda s: policy(s, "[training]\nrounds = 1"),
        "num_rounds: this site's policy expects at most 1",
    ),
    "more seconds": (
        lambda s: policy(s, "[training]\ntask_seconds = 1") | {"local_steps": 10**6},
        "task: this site's policy expects at most 1 s",
    ),
    "a larger rank": (
        lambda s: policy(s, "[adapters]\nmax_rank = 4") | {"peft_config": {"peft_type": "LORA", "r": 8}},
        "peft_config.r: this site's policy expects at most 4, found 8",
    ),
    "a larger rank in one module": (
        lambda s: (
            policy(s, "[adapters]\nmax_rank = 4")
            | {"peft_config": {"peft_type": "LORA", "r": 2, "rank_pattern": {"q_proj": 64}}}
        ),
        "peft_config.rank_pattern.q_proj",
    ),
    "another kind of adapter": (
        lambda s: policy(s, '[adapters]\nkinds = ["LORA"]') | {"peft_config": {"peft_type": "LOHA", "r": 2}},
        "peft_config.peft_type: this site's policy expects one of",
    ),
    "whole weights": (
        lambda s: policy(s, '[leaves]\nweights = "adapters"'),
        "expects an adapter, found 'whole",
    ),
    "whole weights for changes": (lambda s: policy(s, '[leaves]\nweights = "updates"'), 'params_type "DIFF"'),
    "an update of one row": (lambda s: policy(s, "[leaves]\nmin_examples = 1000"), "at least 1000 examples"),
    "too few rows": (lambda s: policy(s, "[data]\nmin_rows = 1000"), "at least 1000 rows, found 10"),
    "paths where names are wanted": (
        lambda s: policy(s, "[places]\nnames_only = true"),
        "model_name_or_path",
    ),
    "a policy that cannot be read": (lambda s: policy(s, "[training]\nmax_lenght = 2"), "PolicyError at"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_job_is_refused(name: str, make, model: Path, site: Path, fl_ctx, audited):
    prepare, words = HOSTILE[name]
    executor: HFSFTExecutor = make(**prepare(site))
    started = time.process_time()
    reply = executor.execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert time.process_time() - started < 20  # one of them trains for a second first
    assert reply.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    reason = reply.get_header(ERROR_HEADER)
    assert words in reason, reason
    assert "\n" not in reason
    assert "Jane" not in reason
    assert "root:" not in reason
    if "rows, found" not in words and name not in ("a link in the app", "rows that grow without end"):
        assert "nvflare_llm refused: " in audited()


@pytest.mark.parametrize(
    "name", ["config_fed_client.conf", "config_fed_server.yml", "sub/config_fed_client.conf"]
)
def test_a_job_whose_configuration_may_include_files_is_refused(name, make, model, site, fl_ctx, audited):
    """HOCON includes any file and any URL that the site can read; no value of it is told."""
    file = app(site) / "config" / name
    file.parent.mkdir(parents=True)
    file.write_text('include file("/etc/passwords.conf")')
    reply = make(sft_config={"optim": "hunter2"}).execute("train", task(weights_of(model)), fl_ctx, Signal())
    reason = reply.get_header(ERROR_HEADER)
    assert f"expected a job of JSON alone, found {Path(name).name}" in reason
    assert "hunter2" not in reason
    assert "nvflare_llm refused: " in audited()


def test_the_name_of_a_task_forges_no_line(make, site, fl_ctx, caplog):
    reply = make().execute("x\nERROR forged \x1b[2J", Shareable(), fl_ctx, Signal())
    assert reply.get_return_code() == ReturnCode.TASK_UNSUPPORTED
    told = [reply.get_header(ERROR_HEADER), *(record.getMessage() for record in caplog.records)]
    assert all(text.isprintable() for text in told), told


@pytest.mark.parametrize("task_name", ["get_weights", "submit_model", "train"])
@pytest.mark.parametrize("text", ["", '[leaves]\ninitial_weights = "never"'])
def test_a_sites_own_weights_do_not_leave_before_training(
    task_name, text, make, model, site, fl_ctx, monkeypatch
):
    """Not those of a folder below the one that the site names, and none at all where it says never."""
    policy(site, text)
    if not text:
        monkeypatch.setenv("NVFLARE_LLM_MODEL", str(model.parent))
    executor = make()
    sent = task({}) if task_name == "train" else Shareable()
    reply = executor.execute(task_name, sent, fl_ctx, Signal())
    assert "this site's own weights would be sent" in reply.get_header(ERROR_HEADER)
    # To have a model evaluated first changes nothing of that.
    result(executor.execute("validate", task(weights_of(model)), fl_ctx, Signal()))
    reply = executor.execute(task_name, Shareable() if task_name != "train" else task({}), fl_ctx, Signal())
    assert "this site's own weights would be sent" in reply.get_header(ERROR_HEADER)


def test_after_training_the_sites_model_may_leave(make, model, site, fl_ctx):
    policy(site, '[leaves]\ninitial_weights = "never"')
    executor = make()
    result(executor.execute("train", task(weights_of(model)), fl_ctx, Signal()))
    assert result(executor.execute("submit_model", Shareable(), fl_ctx, Signal())).data


@pytest.mark.parametrize("text", ["", '[leaves]\ninitial_weights = "never"'])
def test_a_failed_task_does_not_pass_the_sites_own_weights_off_as_trained(
    text, make, model, site, fl_ctx, monkeypatch
):
    """The next task finds the model built anew from the site's disk, after rounds that were trained."""
    policy(site, text)
    if not text:
        monkeypatch.setenv("NVFLARE_LLM_MODEL", str(model.parent))
    executor = make(checkpoint="never")
    result(executor.execute("train", task(weights_of(model)), fl_ctx, Signal()))
    broken = executor.execute(
        "train", task({"no": weights_of(model)["model.norm.weight"]}, 1), fl_ctx, Signal()
    )
    assert broken.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    for name, sent in {"get_weights": Shareable(), "submit_model": Shareable(), "train": task({}, 1)}.items():
        reply = executor.execute(name, sent, fl_ctx, Signal())
        assert "this site's own weights would be sent" in reply.get_header(ERROR_HEADER)


def test_a_state_on_disk_is_a_result_but_no_model_to_begin_from(make, model, site, fl_ctx):
    policy(site, '[leaves]\ninitial_weights = "never"')
    trained = result(
        make(checkpoint="always").execute("train", task(weights_of(model)), fl_ctx, Signal())
    ).data
    again = make(checkpoint="always")
    for name in ("get_weights", "submit_model"):
        sent = result(again.execute(name, Shareable(), fl_ctx, Signal())).data
        assert all(value.equal(trained[key]) for key, value in sent.items())
    reply = again.execute("train", task({}, 1), fl_ctx, Signal())
    assert "this site's own weights would be sent" in reply.get_header(ERROR_HEADER)


def test_what_leaves_is_as_coarse_as_the_site_says(make, model, site, fl_ctx):
    text = '[leaves]\nprecision = "bf16"\nmetrics = ["train_loss"]\nmetric_digits = 2\ncurves = false'
    policy(site, text)
    dxo = result(make().execute("train", task(weights_of(model)), fl_ctx, Signal()))
    for value in dxo.data.values():
        assert value.equal(value.bfloat16().to(value.dtype))
    (told,) = dxo.meta["initial_metrics"].items()
    assert told[0] == "train_loss"
    assert told[1] == float(f"{told[1]:.2g}")


def test_a_site_may_let_out_changes_alone_in_a_few_levels(make, model, site, fl_ctx):
    policy(site, '[leaves]\nprecision = "nf4"')
    reply = make().execute("train", task(weights_of(model)), fl_ctx, Signal())
    assert "params_type: this site's policy expects \"DIFF\", found 'FULL'" in reply.get_header(ERROR_HEADER)
    executor = make(params_type="DIFF")
    dxo = result(executor.execute("train", task(weights_of(model)), fl_ctx, Signal()))
    for value in dxo.data.values():
        first_block = value.flatten()[:64]
        assert 1 < len(first_block.unique()) <= 16
    for name in ("get_weights", "submit_model"):
        reply = executor.execute(name, Shareable(), fl_ctx, Signal())
        assert f"task {name}: this site's policy expects no whole weights" in reply.get_header(ERROR_HEADER)


def test_as_many_processes_as_there_are_devices_are_no_more_than_the_site_gives(
    make, model, site, fl_ctx, monkeypatch
):
    asked = []

    def session(settings: object, *_: object) -> None:
        asked.append(settings.num_processes)
        raise ReportableError("as far as this test goes")

    monkeypatch.setattr(accepted, "processes_for", lambda settings: 8)
    monkeypatch.setattr(executors, "SFTSession", session)
    for text, num_processes in (("", 8), ("[limits]\nprocesses = 3", 3)):
        policy(site, text)
        make(num_processes="auto").execute("train", task(weights_of(model)), fl_ctx, Signal())
        assert asked.pop() == num_processes


def test_a_site_may_tell_the_kind_of_an_error_alone(make, model, site, fl_ctx):
    policy(site, '[leaves]\nerrors = "kind"')
    reply = make(train_data="/etc/passwd").execute("train", task(weights_of(model)), fl_ctx, Signal())
    reason = reply.get_header(ERROR_HEADER)
    assert "PolicyError at nvflare_llm_components/policy/places.py:" in reason
    assert "passwd" not in reason


@pytest.mark.parametrize(
    "arguments",
    [
        {"train_data": "{}"},
        {"train_data": "{}.jsonl"},
        {"eval_data": "/x/{}"},
        {"model_name_or_path": "{}"},
        {"params_type": "{}"},
        {"checkpoint": "{}"},
        {"sft_config": {"optim": "{}"}},
        {"sft_config": {"{}": 1}},
        {"model_kwargs": {"revision": "{} {}"}},
        {"peft_config": {"peft_type": "LORA", "target_modules": ["{}"]}},
        {"local_steps": "{}"},
    ],
)
def test_no_variable_of_the_site_comes_back_in_an_error(
    arguments, make, model, site, fl_ctx, monkeypatch, caplog
):
    """FLARE puts any variable that a job names, such as {$HF_TOKEN}, into the arguments."""
    token = "hf_" + "SoSecret" * 12
    monkeypatch.setenv("HF_TOKEN", token)
    filled = json.loads(json.dumps(arguments).replace("{}", token))
    reply = make(**filled).execute("train", task(weights_of(model)), fl_ctx, Signal())
    reason = reply.get_header(ERROR_HEADER)
    assert "hf_So" not in reason
    assert "SecretSo" not in reason
    assert next(iter(arguments)) in reason or " at nvflare_llm_components/" in reason
    # What is logged as an error is streamed to the server, too.
    streamed = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert not [line for line in streamed if "hf_So" in line or "SecretSo" in line]


def test_what_a_library_says_stays_at_the_site(make, model, site, fl_ctx, monkeypatch, caplog):
    def quoting(*_: object) -> None:
        raise RuntimeError(f"cannot tokenize {SECRET}\nERROR forged line")

    monkeypatch.setattr("nvflare_llm_components.training.engine.build_trainer", quoting)
    reply = make().execute("train", task(weights_of(model)), fl_ctx, Signal())
    reason = reply.get_header(ERROR_HEADER)
    assert "RuntimeError at nvflare_llm_components/training/engine.py:" in reason
    assert "Jane" not in reason
    # FLARE streams what is logged as an error to the server; the rest is for the site's own log.
    told = [record for record in caplog.records if "Jane" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]
    assert "\\nERROR forged line" in told[0].getMessage()
