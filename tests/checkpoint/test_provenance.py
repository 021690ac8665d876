import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nvflare_llm_components.checkpoint.global_models import GlobalModels
from nvflare_llm_components.checkpoint.initial_model import InitialModel
from nvflare_llm_components.checkpoint.manifest import read_manifest
from nvflare_llm_components.checkpoint.provenance import base_of, chain_after, digest_of

START = {"a": torch.zeros(3), "b": torch.ones(2, 2)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "models--org--name/snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    save_file(START, folder / "model.safetensors")
    return folder


def save(root: Path, base: Path, job_id: str, numbers: range) -> list[dict[str, object]]:
    models = GlobalModels(root, InitialModel(START, {}, name="org/name", folder=base))
    records = []
    for number in numbers:
        record = {"round": number, "job_id": job_id, "metrics": {}, "parents": {}}
        models.save_last({name: value + number + 1 for name, value in START.items()}, record)
        records.append(read_manifest(root / "last"))
    return records


def test_the_hash_is_what_a_reader_can_check_with_a_shell(base: Path):
    save_file(START, base / "other.safetensors")
    command = "sha256sum *.safetensors | sha256sum"
    told = subprocess.check_output(["bash", "-c", command], cwd=base, text=True).split()[0]
    assert base_of("org/name", base) == {
        "name": "org/name",
        "weights_sha256": told,
        "revision": "0123456789" * 4,
    }


def test_a_base_without_weights_has_no_hash(tmp_path: Path):
    assert base_of("adapter's base", tmp_path) == {"name": "adapter's base"}


def test_a_base_of_another_federation_names_it(base: Path, tmp_path: Path):
    (*_, last) = save(tmp_path / "one", base, "job-1", range(2))
    found = base_of("one/last", tmp_path / "one/last")
    assert found["federation"] == {"job_id": "job-1", "round": 1, "base": base_of("org/name", base)}
    assert found["weights_sha256"] == last["weights_sha256"]


def test_the_chain_goes_from_the_base_over_each_round_and_each_run(base: Path, tmp_path: Path):
    first = save(tmp_path / "one", base, "job-1", range(2))
    models = GlobalModels(tmp_path / "two", InitialModel(START, {}, name="org/name", folder=base))
    models.take_over(tmp_path / "one")
    second = save(tmp_path / "two", base, "job-2", range(2, 4))
    last = second[-1]
    assert last["base"] == base_of("org/name", base)
    assert [record["earlier_jobs"] for record in [*first, *second]] == [[], [], ["job-1"], ["job-1"]]
    chain = [(entry["round"], entry["job_id"], entry["weights_sha256"]) for entry in last["rounds"]]
    everyone = [*first, *second][:-1]
    assert chain == [(record["round"], record["job_id"], record["weights_sha256"]) for record in everyone]
    assert last["update_norm"] == pytest.approx(7**0.5)


def test_the_base_is_hashed_when_the_job_begins(base: Path, tmp_path: Path):
    models = GlobalModels(tmp_path / "one", InitialModel(START, {}, name="org/name", folder=base))
    begun_with = base_of("org/name", base)
    models.save_last(START, {"round": 0, "job_id": "j", "metrics": {}, "parents": {}})
    save_file({"a": torch.ones(1)}, base / "model.safetensors")
    models.save_last(START, {"round": 1, "job_id": "j", "metrics": {}, "parents": {}})
    assert read_manifest(tmp_path / "one/last")["base"] == begun_with


def test_a_base_that_vanished_costs_no_round(base: Path, tmp_path: Path):
    initial = InitialModel(START, {}, name="org/name", folder=base)
    (base / "model.safetensors").unlink()
    base.rmdir()
    models = GlobalModels(tmp_path / "one", initial)
    models.save_last(START, {"round": 0, "job_id": "j", "metrics": {}, "parents": {}})
    found = read_manifest(tmp_path / "one/last")["base"]
    assert found == {"name": "org/name", "revision": "0123456789" * 4}


def test_the_first_round_has_nothing_before_it():
    assert chain_after({}, lambda: {"name": "x"}, "job-1") == {
        "base": {"name": "x"},
        "rounds": [],
        "earlier_jobs": [],
    }


def test_shards_in_any_order_have_one_hash():
    digests = {"b.safetensors": "2", "a.safetensors": "1", "config.json": "3"}
    assert digest_of(digests) == digest_of(dict(reversed(digests.items())))
    assert digest_of(digests) == digest_of({**digests, "config.json": "4"})
