import copy
from pathlib import Path

import pytest
import torch

from nvflare_llm_components.checkpoint.global_models import GlobalModels
from nvflare_llm_components.checkpoint.initial_model import InitialModel
from nvflare_llm_components.checkpoint.key_metric import KeyMetric
from nvflare_llm_components.checkpoint.manifest import read_manifest, verify_files
from nvflare_llm_components.checkpoint.weight_files import map_weights
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.lazy import Deferred

START = InitialModel({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, {"config.json": b"{}"})


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3,), value), "b": torch.full((2, 2), value)}


def record(number: int, **metrics: float) -> dict[str, object]:
    return {"round": number, "job_id": "job", "metrics": metrics, "parents": {}}


def value_of(folder: Path) -> float:
    return map_weights(folder)["a"][0].item()


def of_sites(*losses: float) -> dict[str, dict[str, float]]:
    return {site: {"eval_loss": loss} for site, loss in zip("xy", losses, strict=False)}


def inode(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_ino


def test_saving_returns_equal_tensors_that_a_deep_copy_shares(tmp_path: Path):
    mine = weights(0.5)
    saved = GlobalModels(tmp_path, START).save_last(mine, record(0))
    assert all(torch.equal(saved[name], value) and saved[name] is not value for name, value in mine.items())
    assert all(copy.deepcopy(saved)[name] is value for name, value in saved.items())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_lazy_values_are_made_once_as_they_are_written(tmp_path: Path, dtype: str | None):
    made: list[str] = []

    def lazy(name: str, value: torch.Tensor) -> Deferred:
        def make() -> torch.Tensor:
            made.append(name)
            return value.view(-1)

        return Deferred(lambda: iter([make()]), value.shape, value.dtype)

    models = GlobalModels(tmp_path, START, save_dtype=dtype)
    saved = models.save_last({name: lazy(name, value) for name, value in weights(0.1).items()}, record(0))
    assert sorted(made) == ["a", "b"]
    assert all(torch.equal(saved[name], value) for name, value in weights(0.1).items())
    assert read_manifest(tmp_path / "last")["update_norm"] == pytest.approx(0.1 * 7**0.5)
    verify_files(tmp_path / "last")


def test_a_lazy_value_that_cannot_be_made_or_is_not_finite_leaves_the_last_model(tmp_path: Path):
    models = GlobalModels(tmp_path, START)
    models.save_last(weights(1), record(0))

    def lost() -> torch.Tensor:
        raise OSError("the site's file is gone")

    for value, told in (
        (lost, "is gone.*see to the cause"),
        (lambda: torch.full((4,), torch.nan), r"b: 4 of 4 values"),
    ):
        broken = weights(2) | {
            "b": Deferred(lambda value=value: iter([value().view(-1)]), (2, 2), torch.float32)
        }
        with pytest.raises(CheckpointError, match=told):
            models.save_last(broken, record(1))
        assert value_of(tmp_path / "last") == 1
        verify_files(tmp_path / "last")
        assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_rounds_are_kept_as_links_to_the_same_files(tmp_path: Path):
    models = GlobalModels(tmp_path, START, keep=["last", "every 2"])
    for number in range(5):
        models.save_last(weights(number), record(number))
        if number % 2:
            assert inode(tmp_path / f"round_{number}") == inode(tmp_path / "last")
    assert {path.name for path in tmp_path.iterdir()} == {"last", "round_1", "round_3"}
    for name, value in {"last": 4, "round_1": 1, "round_3": 3}.items():
        assert (value_of(tmp_path / name), read_manifest(tmp_path / name)["round"]) == (value, value)
        verify_files(tmp_path / name)


def test_the_best_is_a_link_where_it_is_the_last(tmp_path: Path):
    models = GlobalModels(tmp_path, START)
    evaluated = models.save_last(weights(1), record(0))
    models.save_best(evaluated, record(0, eval_loss=2.0), KeyMetric())
    assert inode(tmp_path / "best") == inode(tmp_path / "last")
    assert read_manifest(tmp_path / "last")["metrics"] == {}
    models.save_last(weights(2), record(1))
    assert (value_of(tmp_path / "best"), value_of(tmp_path / "last")) == (1, 2)
    assert read_manifest(tmp_path / "best")["metrics"] == {"eval_loss": 2.0}


def test_the_best_is_written_out_where_it_is_another_model(tmp_path: Path):
    models = GlobalModels(tmp_path, START)
    models.save_last(weights(1), record(1))
    models.save_best(weights(7), record(0))
    assert (value_of(tmp_path / "best"), value_of(tmp_path / "last")) == (7, 1)


def test_no_best_where_none_is_wanted(tmp_path: Path):
    models = GlobalModels(tmp_path, START, keep=["last"])
    models.save_best(models.save_last(weights(1), record(0)), record(0))
    assert set(models.folders()) == {"last"}


def test_a_narrow_save_dtype_keeps_the_master_beside(tmp_path: Path):
    models = GlobalModels(tmp_path, START, save_dtype="bfloat16")
    saved = models.save_last(weights(1 + 1e-6), record(0))
    assert saved["a"].dtype == torch.float32
    assert torch.equal(saved["a"], weights(1 + 1e-6)["a"])
    assert map_weights(tmp_path / "last")["a"].dtype == torch.bfloat16
    models.save_best(saved, record(0))
    assert inode(tmp_path / "best") == inode(tmp_path / "last")
    assert torch.equal(map_weights(tmp_path / "master")["a"], saved["a"])


@pytest.mark.parametrize(("last", "best", "expected"), [(1.0, 2.0, 5.0), (2.0, 2.0, 3.0), (3.0, 2.0, 3.0)])
def test_the_last_becomes_best_where_its_loss_is_lower(
    tmp_path: Path, last: float, best: float, expected: float
):
    models = GlobalModels(tmp_path, START)
    models.save_best(weights(3), record(0))
    models.save_last(weights(5), record(1))
    evaluated = {"last": of_sites(last, last), "best": of_sites(best, best), "source": of_sites(9.0)}
    assert models.judge_last(evaluated)
    assert value_of(tmp_path / "best") == expected
    assert read_manifest(tmp_path / "last")["metrics"] == {"eval_loss": last}
    assert read_manifest(tmp_path / "best")["metrics"] == {"eval_loss": min(last, best)}


def test_the_last_becomes_best_where_no_selector_named_one(tmp_path: Path):
    models = GlobalModels(tmp_path, START)
    models.save_last(weights(5), record(1))
    assert "new best" in models.judge_last({"last": of_sites(1.0)})
    assert value_of(tmp_path / "best") == 5


@pytest.mark.parametrize(
    "evaluated", [{"last": of_sites(1.0)}, {"last": of_sites(1.0), "best": of_sites(2.0, 2.0)}]
)
def test_models_that_not_all_sites_evaluated_are_not_compared(tmp_path: Path, evaluated):
    models = GlobalModels(tmp_path, START)
    models.save_best(weights(3), record(0))
    models.save_last(weights(5), record(1))
    assert models.judge_last(evaluated) == ""
    assert value_of(tmp_path / "best") == 3


ACCURACY = KeyMetric("accuracy", "max")


def test_the_jobs_key_metric_decides_whatever_the_others_say(tmp_path: Path):
    models = GlobalModels(tmp_path, START)
    models.save_best(weights(1), record(0, accuracy=0.5, eval_loss=1.0), ACCURACY)
    assert models.save_best(weights(2), record(1, accuracy=0.6, eval_loss=2.0), ACCURACY)
    assert not models.save_best(weights(3), record(2, accuracy=0.6, eval_loss=0.1), ACCURACY)
    assert not models.save_best(weights(3), record(2, eval_loss=0.1), ACCURACY)
    assert value_of(tmp_path / "best") == 2


def test_the_last_is_judged_by_the_key_metric_that_the_best_was_chosen_by(tmp_path: Path):
    models = GlobalModels(tmp_path, START)
    models.save_best(weights(1), record(0, accuracy=0.5), ACCURACY)
    models.save_last(weights(2), record(1))
    better_loss = {"x": {"accuracy": 0.5, "eval_loss": 0.1}}
    assert "best stays" in models.judge_last(
        {"last": better_loss, "best": {"x": {"accuracy": 0.5, "eval_loss": 2.0}}}
    )
    assert models.judge_last({"last": {"x": {"eval_loss": 0.1}}, "best": of_sites(2.0)}) == ""
    assert value_of(tmp_path / "best") == 1
    better = {"last": {"x": {"accuracy": 0.6}}, "best": {"x": {"accuracy": 0.5}}}
    assert models.judge_last(better) == "last is the new best: accuracy 0.600000, was 0.500000"
    assert KeyMetric.of(read_manifest(tmp_path / "best")) == ACCURACY


def test_a_resumed_run_keeps_best_and_its_key_metric(tmp_path: Path):
    earlier = GlobalModels(tmp_path / "earlier", START)
    earlier.save_best(earlier.save_last(weights(1), record(0)), record(0, accuracy=0.5), ACCURACY)
    models = GlobalModels(tmp_path / "new", START)
    models.take_over(tmp_path / "earlier")
    assert not models.save_best(weights(2), record(1, accuracy=0.4), ACCURACY)
    models.save_last(weights(3), record(1))
    assert models.judge_last({"last": {"x": {"accuracy": 0.6}}, "best": {"x": {"accuracy": 0.5}}})
    assert value_of(tmp_path / "new/best") == 3


def test_a_changed_file_is_found_when_it_is_loaded(tmp_path: Path):
    models = GlobalModels(tmp_path, START)
    models.save_last(weights(5), record(1))
    assert models.load("last")["a"][0] == 5
    path = tmp_path / "last/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        models.load("last")


@pytest.mark.parametrize(
    "keep", [[], ["best"], ["last", "every"], ["last", "every 0"], ["last", "every 1", "every 2"]]
)
def test_a_wrong_keep_is_named(tmp_path: Path, keep: list[str]):
    with pytest.raises(CheckpointError, match='keep: expected "last"'):
        GlobalModels(tmp_path, START, keep=keep)


def test_a_refused_model_is_named_with_its_round_and_sites(tmp_path: Path):
    origin = {**record(4), "parents": {"sites": ["x", "y"]}}
    with pytest.raises(CheckpointError, match=r"after round 4 from sites \['x', 'y'\]: expected finite"):
        GlobalModels(tmp_path, START).save_last(weights(float("nan")), origin)


def test_a_wrong_save_dtype_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="save_dtype: expected one of"):
        GlobalModels(tmp_path, START, save_dtype="fp16")
