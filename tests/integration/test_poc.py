"""A deployed federation: what it leaves, and what goes on from there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvflare_llm_components.tools.resume import resume_job
from tests.integration.deployment import Poc, deployed, records, wait_for
from tests.integration.simulator import NUM_ROUNDS, copy_job, variables_of
from tests.tiny import write_site_data

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SITES = ["site-1", "site-2"]


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Poc]:
    folder = tmp_path_factory.mktemp("poc")
    data = write_site_data(folder / "data", SITES, num_rows=200)
    with deployed(folder, SITES, variables_of(model, data)) as poc:
        yield poc


def job(folder: Path, local_epochs: float) -> Path:
    server = {"num_clients": len(SITES), "num_rounds": NUM_ROUNDS}
    return copy_job("sft_exact", folder / "job", server=server, client={"local_epochs": local_epochs})


def test_a_deployed_federation_completes_and_leaves_no_state(poc: Poc, tmp_path: Path):
    job_id = poc.submit(job(tmp_path, 0.1))
    assert poc.ending(job_id) == "FINISHED:COMPLETED"
    for site in SITES:
        assert [record["round"] for record in records(poc.run_dir(site, job_id), "round")] == [0, 1]
        assert not (poc.run_dir(site, job_id) / "trainer_state").exists()


def test_an_aborted_job_is_downloaded_and_continued_to_the_same_weights(poc: Poc, tmp_path: Path):
    """FLARE has removed the server's run directory by then; the download is what is left."""
    undisturbed = poc.submit(job(tmp_path / "undisturbed", 2))
    assert poc.ending(undisturbed) == "FINISHED:COMPLETED"
    job_id = poc.submit(job(tmp_path / "aborted", 2))
    wait_for(lambda: [r for r in records(poc.run_dir(SITES[0], job_id), "train") if r["round"] == 1])
    poc.cli("job", "abort", job_id, "--force")
    assert poc.ending(job_id) == "FINISHED:ABORTED"
    download = poc.download(job_id, tmp_path)
    assert not poc.run_dir("server", job_id).exists()
    print(resume_job(download, tmp_path / "resumed"))
    resumed = poc.submit(tmp_path / "resumed")
    assert poc.ending(resumed) == "FINISHED:COMPLETED"
    for site in SITES:
        log = (poc.run_dir(site, resumed) / "log.txt").read_text()
        assert f"trainer_state continues from {poc.run_dir(site, job_id)}/trainer_state" in log
        assert not (poc.run_dir(site, resumed) / f"app_{site}/earlier_run").exists(), "the server's alone"
    expected, found = (final_weights(poc.download(one, tmp_path)) for one in (undisturbed, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def final_weights(download: Path) -> dict[str, torch.Tensor]:
    return load_file(download / "workspace/global_model/last/model.safetensors")


def test_a_killed_site_ends_the_job_and_keeps_its_last_round(poc: Poc, tmp_path: Path):
    # The other site trains on until FLARE has noticed: seconds, far less than a round takes here.
    job_id = poc.submit(job(tmp_path, 8))
    killed = poc.run_dir(SITES[0], job_id)
    wait_for(lambda: [r for r in records(killed, "train") if r["round"] == 1])
    poc.worker(SITES[0], job_id).kill()
    assert poc.ending(job_id) == "FINISHED:EXECUTION_EXCEPTION"
    wait_for(lambda: not poc.processes("worker_process", job_id))
    for site in SITES:
        run_dir = poc.run_dir(site, job_id)
        (round_zero,) = records(run_dir, "round")
        states = [path.name for path in (run_dir / "trainer_state").iterdir()]
        assert states == [f"step-{round_zero['end_step']}"]
