import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from nvflare_llm_components.tools.demo import JOBS, demo, raw_files, shipped_jobs
from nvflare_llm_components.tools.demo_figure import Outcome, draw
from nvflare_llm_components.tools.runs import SiteRun

JOB_CONFIGS = Path(__file__).parents[2] / "job_configs"


def site_run(folder: Path, label: str) -> SiteRun:
    records = [{"kind": "eval", "step": 0, "round": 0, "eval_loss": 2.0}]
    records += [{"kind": "train", "step": n, "epoch": n / 4, "loss": 2.0 / n} for n in range(1, 5)]
    records += [{"kind": "round", "round": 0, "start_step": 0, "end_step": 4}]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return SiteRun(label, folder)


def test_raw_files_are_found_by_the_name_of_their_set(tmp_path):
    for name in ("databricks-dolly-15k.jsonl", "alpaca_data.json", "oasst1-train.parquet"):
        (tmp_path / name).touch()
    for other in ("oasst1-validation.parquet", "README.md", "dolly.txt"):
        (tmp_path / other).touch()
    found = {name: [file.name for file in files] for name, files in raw_files(tmp_path).items()}
    assert found == {
        "dolly": ["databricks-dolly-15k.jsonl"],
        "alpaca": ["alpaca_data.json"],
        "oasst1": ["oasst1-train.parquet"],
    }


def test_a_set_without_file_is_named(tmp_path):
    (tmp_path / "dolly.jsonl").touch()
    with pytest.raises(ValueError, match=r"expected a file \*alpaca\*"):
        raw_files(tmp_path)


def test_jobs_are_looked_for_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="Found no sft, sft_int8, peft_lora"):
        demo(out=tmp_path / "out", jobs=tmp_path, console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", [JOB_CONFIGS.parent, Path(__file__).parent])
def test_the_jobs_of_the_demo_are_shipped(monkeypatch, folder):
    monkeypatch.chdir(folder)
    assert all((shipped_jobs() / name / "meta.json").is_file() for name in JOBS)


def test_figure_has_a_panel_for_each_site(tmp_path):
    import matplotlib as mpl

    sites = {site: site_run(tmp_path / site, site) for site in ("dolly", "alpaca")}
    before, after = dict.fromkeys(sites, 2.0), dict.fromkeys(sites, 1.0)
    federated = Outcome("sft", sites, before, after, 10, 1.0)
    central = Outcome("centralized", {"centralized": site_run(tmp_path / "c", "c")}, before, after, 0, 1.0)
    with mpl.rc_context({"svg.fonttype": "none"}):
        draw([federated], central, tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    for label in (
        "dolly: eval loss",
        "alpaca: eval loss",
        "centralized, final",
        "training loss",
        "rounds done",
    ):
        assert label in text
