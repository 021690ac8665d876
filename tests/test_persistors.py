import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ProcessType, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.initialize_global_weights import InitializeGlobalWeights
from nvflare.fuel.utils import fobs

from nvflare_llm_components.checkpoint.weight_files import map_weights
from nvflare_llm_components.persistors import SafetensorsModelLocator, SafetensorsModelPersistor, start
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.server_model import SafetensorsModule
from nvflare_llm_components.tensors.errors import CheckpointError
from tests.checkpoint.tiny_models import save_tiny_llama, state_of
from tests.federation import Federation


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def persistor(source: Path) -> SafetensorsModelPersistor:
    return SafetensorsModelPersistor(model_name_or_path=str(source))


@pytest.fixture
def fl_ctx(tmp_path: Path, persistor: SafetensorsModelPersistor) -> FLContext:
    """A context of a job whose run directory is `tmp_path/run`, in round 1."""
    workspace = SimpleNamespace(
        get_run_dir=lambda job_id: str(tmp_path / "run"),
        get_app_dir=lambda job_id: str(tmp_path / "run" / "app_server"),
        get_root_dir=lambda: str(tmp_path),
        get_site_config_dir=lambda: str(tmp_path / "local"),
    )
    engine = SimpleNamespace(
        get_workspace=lambda: workspace,
        get_component={"persistor": persistor}.get,
        fire_event=lambda *_: None,
    )
    context = FLContext()
    context.set_prop("__engine__", engine, private=True, sticky=True)
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True, sticky=True)
    context.set_prop(FLContextKey.CURRENT_RUN, "job", private=True, sticky=True)
    context.set_prop("current_round", 1, private=True, sticky=False)
    return context


def shifted(source: Path, amount: float) -> dict[str, torch.Tensor]:
    return {name: value + amount for name, value in map_weights(source).items()}


def last(tmp_path: Path) -> Path:
    return tmp_path / "run/global_model/last"


def test_it_starts_from_the_source(persistor, fl_ctx, source: Path):
    weights = persistor.load(fl_ctx)["weights"]
    assert all(torch.equal(weights[name], value) for name, value in map_weights(source).items())


def test_a_broadcasts_deep_copy_shares_the_tensors_and_can_be_sent(persistor, fl_ctx):
    weights = persistor.load(fl_ctx)["weights"]
    broadcast = copy.deepcopy(weights)
    assert all(broadcast[name] is weights[name] for name in weights)
    received = fobs.loads(fobs.dumps(broadcast))
    assert all(torch.equal(received[name], value) for name, value in weights.items())


def test_what_becomes_of_the_source_folder_during_the_job_changes_nothing(
    persistor, fl_ctx, source, tmp_path
):
    weights = shifted(source, 0.5)
    expected = {path.name: path.read_bytes() for path in source.glob("tokenizer*")}
    persistor.load(fl_ctx)
    first = {name: value.clone() for name, value in map_weights(source).items()}
    shutil.rmtree(source)
    persistor.save(make_model_learnable(weights, {}), fl_ctx)
    assert {name: (last(tmp_path) / name).read_bytes() for name in expected} == expected
    found = persistor.get("source", fl_ctx)["weights"]
    assert all(torch.equal(found[name], value) for name, value in first.items())


@pytest.mark.parametrize("keep_first", [True, False])
def test_a_tied_weight_may_come_under_its_other_name(persistor, fl_ctx, source, tmp_path, keep_first):
    """As from a script that sends `model.state_dict()`."""
    persistor.load(fl_ctx)
    weights = shifted(source, 0.5)
    expected = dict(weights)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if not keep_first:
        del weights["model.embed_tokens.weight"]
    persistor.save(make_model_learnable(weights, {}), fl_ctx)
    assert weights.keys() == expected.keys() == map_weights(last(tmp_path)).keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_tied_weight_with_two_values_is_refused(persistor, fl_ctx, source):
    persistor.load(fl_ctx)
    weights = shifted(source, 0.5)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected the values of model\.embed_tokens"):
        persistor.save(make_model_learnable(weights, {}), fl_ctx)


def test_it_saves_each_round_and_hands_the_saved_file_back(persistor, fl_ctx, source: Path, tmp_path: Path):
    persistor.load(fl_ctx)
    for amount in (0.5, 1.5):
        weights = shifted(source, amount)
        mine = dict(weights)
        persistor.save(make_model_learnable(weights, {}), fl_ctx)
        saved = map_weights(last(tmp_path))
        assert all(torch.equal(saved[name], value) for name, value in mine.items())
        assert all(torch.equal(weights[name], value) for name, value in mine.items())
        assert all(weights[name] is not value for name, value in mine.items())
        assert all(copy.deepcopy(weights)[name] is value for name, value in weights.items())
    record = json.loads((last(tmp_path) / "federation.json").read_text())
    assert (record["round"], record["job_id"]) == (1, "job")


def evaluated_by(fl_ctx: FLContext, owner: str, site: str, loss: float | None) -> None:
    metrics = DXO(DataKind.METRICS, data={"eval_loss": loss}).to_shareable()
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION) if loss is None else metrics
    for key, value in (("_model_owner_", owner), ("_data_client_", site), ("_validation_result_", reply)):
        fl_ctx.set_prop(key, value, private=True, sticky=False)


def test_an_evaluation_after_the_training_can_make_the_last_model_the_best(
    persistor, fl_ctx, source: Path, tmp_path: Path
):
    first, second = shifted(source, 0.5), shifted(source, 1.5)
    persistor.save(make_model_learnable(first, {}), fl_ctx)
    fl_ctx.set_prop("global_model", make_model_learnable(first, {}), private=True, sticky=True)
    persistor.handle_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)
    persistor.save(make_model_learnable(second, {}), fl_ctx)
    for owner, site, loss in [
        ("SRV_last", "x", 1.0),
        ("SRV_best", "x", 2.0),
        ("SRV_last", "y", 2.0),
        ("SRV_best", "y", 2.0),
        ("x", "y", 0.5),
        ("SRV_source", "y", None),
    ]:
        evaluated_by(fl_ctx, owner, site, loss)
        persistor.handle_event(AppEventType.VALIDATION_RESULT_RECEIVED, fl_ctx)
    persistor.handle_event(EventType.END_RUN, fl_ctx)
    best = tmp_path / "run/global_model/best"
    assert torch.equal(map_weights(best)["model.norm.weight"], second["model.norm.weight"])
    assert json.loads((best / "federation.json").read_text())["metrics"] == {"eval_loss": 1.5}


def test_a_result_is_let_go_of_after_it_was_aggregated(persistor, fl_ctx):
    peer = FLContext()
    peer.set_prop(FLContextKey.SHAREABLE, Shareable(), private=True, sticky=False)
    fl_ctx.set_peer_context(peer)
    fl_ctx.set_prop(FLContextKey.TASK_RESULT, Shareable(), private=True, sticky=False)
    persistor.handle_event(EventType.AFTER_PROCESS_SUBMISSION, fl_ctx)
    assert fl_ctx.get_prop(FLContextKey.TASK_RESULT) is None
    assert peer.get_prop(FLContextKey.SHAREABLE) is None


class Encoded:
    def __init__(self, value: torch.Tensor):
        self.value = value

    def materialize(self) -> torch.Tensor:
        return self.value


def test_encoded_and_numpy_values_are_saved(persistor, fl_ctx, source: Path, tmp_path: Path):
    weights: dict[str, object] = dict(shifted(source, 0.5))
    weights["model.norm.weight"] = Encoded(torch.full((32,), 4.0))
    weights["model.layers.0.input_layernorm.weight"] = numpy.full((32,), 5.0, dtype=numpy.float32)
    persistor.save(make_model_learnable(weights, {}), fl_ctx)
    saved = map_weights(last(tmp_path))
    assert saved["model.norm.weight"][0] == 4.0
    assert saved["model.layers.0.input_layernorm.weight"][0] == 5.0
    assert isinstance(weights["model.layers.0.input_layernorm.weight"], numpy.ndarray)


def test_save_dtype_is_for_the_disk_and_the_master_stays(persistor, fl_ctx, source: Path, tmp_path: Path):
    persistor.save_dtype = "bfloat16"
    weights = shifted(source, 1e-6)
    mine = dict(weights)
    persistor.save(make_model_learnable(weights, {}), fl_ctx)
    assert {value.dtype for value in map_weights(last(tmp_path)).values()} == {torch.bfloat16}
    assert all(torch.equal(weights[name], value) for name, value in mine.items())


def broken(source: Path, change) -> dict[str, torch.Tensor]:
    weights = shifted(source, 0.0)
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.clear(), "after round 1 is empty"),
        (lambda w: w.pop("model.norm.weight"), r"1 missing \(model\.norm\.weight\)"),
        (lambda w: w.update({"model.norm.weight": torch.ones(5)}), r"model\.norm\.weight \(5,\) instead"),
        (lambda w: w["model.norm.weight"].fill_(float("nan")), r"model\.norm\.weight: 32 of 32 values"),
    ],
)
def test_an_unsound_aggregate_is_refused_and_the_last_good_one_stays(
    persistor, fl_ctx, source: Path, tmp_path: Path, change, sentence: str
):
    persistor.save(make_model_learnable(shifted(source, 0.5), {}), fl_ctx)
    with pytest.raises(CheckpointError, match=sentence):
        persistor.save(make_model_learnable(broken(source, change), {}), fl_ctx)
    saved, good = map_weights(last(tmp_path)), shifted(source, 0.5)
    assert all(torch.equal(saved[name], value) for name, value in good.items())


def received(persistor, fl_ctx: FLContext, site: str, weights: dict[str, object]) -> Shareable:
    """What FLARE's server does with a result before the controller sees it."""
    result = DXO(DataKind.WEIGHTS, data=weights).to_shareable()
    peer = FLContext()
    peer.set_prop(ReservedKey.IDENTITY_NAME, site)
    fl_ctx.set_peer_context(peer)
    fl_ctx.set_prop(FLContextKey.PROCESS_TYPE, ProcessType.SERVER_JOB, private=True, sticky=True)
    fl_ctx.set_prop(FLContextKey.TASK_NAME, "get_weights", private=True, sticky=False)
    fl_ctx.set_prop(FLContextKey.TASK_RESULT, result, private=True, sticky=False)
    persistor.handle_event(EventType.AFTER_TASK_RESULT_FILTER, fl_ctx)
    return result


def test_a_site_whose_result_was_refused_is_named_where_a_save_fails(persistor, fl_ctx, source: Path):
    norm = "model.norm.weight"
    bad = broken(source, lambda w: w[norm].fill_(float("inf")))
    assert (
        received(persistor, fl_ctx, "alpaca", dict(shifted(source, 0.5))).get_return_code() == ReturnCode.OK
    )
    assert received(persistor, fl_ctx, "dolly", dict(bad)).get_return_code() != ReturnCode.OK
    with pytest.raises(
        CheckpointError, match=rf"Refused in round 1: Site 'dolly'.*{norm}: 32 of 32"
    ) as caught:
        persistor.save(make_model_learnable({}, {}), fl_ctx)
    assert "alpaca" not in str(caught.value)


def test_a_site_is_blamed_for_one_save_only(persistor, fl_ctx, source: Path):
    bad = broken(source, lambda w: w["model.norm.weight"].fill_(float("nan")))
    received(persistor, fl_ctx, "dolly", dict(bad))
    persistor.save(make_model_learnable(shifted(source, 0.5), {}), fl_ctx)
    with pytest.raises(CheckpointError, match="NaN or Inf") as caught:
        persistor.save(make_model_learnable(bad, {}), fl_ctx)
    assert "dolly" not in str(caught.value)


def test_best_is_the_model_that_was_evaluated(persistor, fl_ctx, source: Path, tmp_path: Path):
    evaluated = make_model_learnable(shifted(source, 0.5), {})
    fl_ctx.set_prop("global_model", evaluated, private=True, sticky=True)
    info = {"best_metrics": {"eval_loss": 2.5}}
    fl_ctx.set_prop("metrics_selection_info", info, private=True, sticky=False)
    persistor.handle_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)
    best = tmp_path / "run/global_model/best"
    assert all(torch.equal(map_weights(best)[name], value) for name, value in shifted(source, 0.5).items())
    record = json.loads((best / "federation.json").read_text())
    assert (record["round"], record["metrics"]) == (0, {"eval_loss": 2.5})


def test_the_inventory_grows_and_the_locator_names_it(persistor, fl_ctx, source: Path):
    locator = SafetensorsModelLocator()
    assert locator.get_model_names(fl_ctx) == ["source"]
    model = make_model_learnable(shifted(source, 0.5), {})
    fl_ctx.set_prop("global_model", model, private=True, sticky=True)
    persistor.handle_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)
    persistor.save(make_model_learnable(shifted(source, 1.5), {}), fl_ctx)
    assert locator.get_model_names(fl_ctx) == ["source", "last", "best"]
    norm = "model.norm.weight"
    found = {
        name: locator.locate_model(name, fl_ctx).data[norm].mean().item()
        for name in ("source", "last", "best")
    }
    assert found == {"source": 1.0, "last": 2.5, "best": 1.5}
    for alias, name in (("FL_global_model.pt", "last"), ("best_FL_global_model.pt", "best")):
        assert locator.locate_model(alias, fl_ctx).data[norm].mean().item() == found[name]


def test_an_unknown_model_is_named(persistor, fl_ctx):
    with pytest.raises(ValueError, match=r"'other': expected one of \['source'\]"):
        persistor.get_model("other", fl_ctx)


def test_the_locator_wants_our_persistor(fl_ctx):
    with pytest.raises(TypeError, match="expected component 'other' to be a SafetensorsModelPersistor"):
        SafetensorsModelLocator(persistor_id="other").get_model_names(fl_ctx)


def test_an_adapter_is_saved_as_a_peft_folder(tmp_path: Path, source: Path, fl_ctx):
    persistor = SafetensorsModelPersistor(
        model_name_or_path=str(source),
        peft_config={"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
    )
    weights = dict(persistor.load(fl_ctx)["weights"])
    persistor.save(make_model_learnable({k: v + 1 for k, v in weights.items()}, {}), fl_ctx)
    assert (last(tmp_path) / "adapter_config.json").is_file()
    assert not (last(tmp_path) / "config.json").exists()
    again = SafetensorsModelPersistor(model_name_or_path=str(last(tmp_path)))
    assert all(torch.equal(again.load(fl_ctx)["weights"][k], v + 1) for k, v in weights.items())


def test_construction_reads_nothing():
    SafetensorsModelPersistor(model_name_or_path="/no/such/folder")


def test_the_tiny_model_is_what_the_files_hold(source: Path, tmp_path: Path):
    assert state_of(save_tiny_llama(tmp_path / "again")).keys() == map_weights(source).keys()


def test_it_goes_on_from_an_earlier_run_and_keeps_its_best(persistor, fl_ctx, source: Path, tmp_path: Path):
    first = shifted(source, 0.5)
    persistor.save(make_model_learnable(first, {}), fl_ctx)
    name_best(persistor, fl_ctx, first, 2.0)
    persistor.save(make_model_learnable(shifted(source, 1.5), {}), fl_ctx)
    (tmp_path / "run").rename(tmp_path / "earlier")
    again = SafetensorsModelPersistor(
        model_name_or_path=str(source), resume_from=str(tmp_path / "earlier"), keep=["last", "best"]
    )
    weights = again.load(fl_ctx)["weights"]
    assert weights["model.norm.weight"].mean() == 2.5
    assert list(again.get_model_inventory(fl_ctx)) == ["source", "last", "best"]
    name_best(again, fl_ctx, weights, 3.0)
    best = tmp_path / "run/global_model/best"
    assert map_weights(best)["model.norm.weight"].mean() == 1.5
    name_best(again, fl_ctx, weights, 1.0)
    assert map_weights(best)["model.norm.weight"].mean() == 2.5


def name_best(persistor, fl_ctx: FLContext, weights: dict[str, torch.Tensor], loss: float) -> None:
    info = {"best_metrics": {"eval_loss": loss}, "key_metric": {"name": "eval_loss", "mode": "min"}}
    fl_ctx.set_prop("global_model", make_model_learnable(weights, {}), private=True, sticky=True)
    fl_ctx.set_prop("metrics_selection_info", info, private=True, sticky=False)
    persistor.handle_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)


def test_an_earlier_run_without_a_model_is_named(fl_ctx, source: Path, tmp_path: Path):
    persistor = SafetensorsModelPersistor(
        model_name_or_path=str(source), resume_from=str(tmp_path / "earlier")
    )
    with pytest.raises(CheckpointError, match="expected a saved model below"):
        persistor.load(fl_ctx)


KERNEL = {"_attn_implementation": "someone/kernels"}
HOSTILE = [({"num_hidden_layers": 10**6}, "num_hidden_layers: expected"), (KERNEL, "download a kernel")]


@pytest.mark.parametrize(("change", "reason"), HOSTILE)
def test_the_model_of_an_earlier_run_is_held_to_what_a_named_one_is(
    persistor, fl_ctx, source: Path, tmp_path: Path, change: dict, reason: str
):
    persistor.save(make_model_learnable(shifted(source, 0.5), {}), fl_ctx)
    (tmp_path / "run").rename(tmp_path / "earlier")
    file = tmp_path / "earlier/global_model/last/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    settings = {"model_name_or_path": str(source), "resume_from": str(tmp_path / "earlier")}
    with pytest.raises(PolicyError, match=reason):
        SafetensorsModelPersistor(**settings).load(fl_ctx)
    module = SafetensorsModule(**settings)
    module.handle_event(EventType.START_RUN, fl_ctx)
    with pytest.raises(PolicyError, match=reason):
        list(module.named_parameters())


@pytest.mark.parametrize(("initial_weights", "num_read"), [("sites", 1), ("server", 0)])
def test_what_sites_send_first_is_held_against_a_model_that_is_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, initial_weights: str, num_read: int
):
    """Sites wait five seconds for the server; a large model takes longer to build."""
    read = []
    load = start.load_initial_model
    monkeypatch.setattr(start, "load_initial_model", lambda *given: read.append(given) or load(*given))
    persistor = SafetensorsModelPersistor(model_name_or_path=str(source), initial_weights=initial_weights)
    workflow = InitializeGlobalWeights()
    server = Federation(tmp_path / "server", workflow, {"persistor": persistor}, sites=["a"]).start()
    assert len(read) == num_read
    server.ask("a")
    server.answer("a", DXO(DataKind.WEIGHTS, dict(map_weights(source))).to_shareable())
    server.end()
    assert server.panic is None
    assert len(read) == 1


def test_a_model_that_cannot_be_read_is_told_where_it_ends_the_job(tmp_path: Path):
    persistor = SafetensorsModelPersistor(model_name_or_path=str(tmp_path / "none"), initial_weights="sites")
    server = Federation(tmp_path / "server", InitializeGlobalWeights(), {"persistor": persistor}, sites=["a"])
    server.fire_event(EventType.START_RUN, server.new_context())
    with pytest.raises(CheckpointError, match="found nothing at"):
        persistor.load(server.new_context())


def test_a_model_larger_than_the_server_takes_is_refused(persistor, fl_ctx, tmp_path: Path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/nvflare_llm_policy.toml").write_text("[limits]\nmodel_gib = 0.000001")
    with pytest.raises(PolicyError, match="expects weights of at most 1e-06 GiB once loaded"):
        persistor.load(fl_ctx)


def test_an_adapter_larger_than_the_server_takes_is_refused_before_it_is_made(
    fl_ctx, source: Path, tmp_path: Path
):
    """Made, this one would want the base's weights, which are not there."""
    (source / "model.safetensors").unlink()
    settings = {
        "model_name_or_path": str(source),
        "peft_config": {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "use_dora": True},
    }
    (tmp_path / "local").mkdir()
    (tmp_path / "local/nvflare_llm_policy.toml").write_text("[limits]\nmodel_gib = 0.000001")
    too_large = "expects weights of at most 1e-06 GiB once loaded"
    with pytest.raises(PolicyError, match=too_large):
        SafetensorsModelPersistor(**settings).load(fl_ctx)
    module = SafetensorsModule(**settings)
    module.handle_event(EventType.START_RUN, fl_ctx)
    with pytest.raises(PolicyError, match=too_large):
        list(module.named_parameters())


def test_a_disk_that_must_keep_room_keeps_the_last_model(persistor, fl_ctx, source: Path, tmp_path: Path):
    persistor.save(make_model_learnable(shifted(source, 1.0), {}), fl_ctx)
    (tmp_path / "local").mkdir()
    (tmp_path / "local/nvflare_llm_policy.toml").write_text("[limits]\nfree_disk_gib = 1e12")
    with pytest.raises(PolicyError, match=r"at least 1e\+12 GiB free"):
        persistor.save(make_model_learnable(shifted(source, 2.0), {}), fl_ctx)
    kept = map_weights(last(tmp_path))
    assert all(torch.equal(kept[name], value) for name, value in shifted(source, 1.0).items())
