import json
from pathlib import Path

import pytest
from nvflare.fuel.f3.comm_config import VarName
from nvflare.fuel.utils.config_factory import ConfigFactory

from nvflare_llm_components.tools.allow import allow
from nvflare_llm_components.tools.line_settings import FILE, LINE_SETTINGS, write_line_settings


def test_every_name_is_one_that_flare_reads():
    known = {value for name, value in vars(VarName).items() if not name.startswith("_")}
    assert LINE_SETTINGS.keys() <= known


def test_what_waits_for_an_acknowledgment_outlasts_the_slowest_line():
    window, megabit = LINE_SETTINGS["streaming_window_size"] * 8, 1e6
    assert window / (2 * megabit) < LINE_SETTINGS["streaming_retry_wait"]
    assert LINE_SETTINGS["streaming_ack_interval"] * 2 <= LINE_SETTINGS["streaming_window_size"]
    six_minutes = 360
    for name in ("retry_timeout", "ack_progress_timeout", "ack_wait", "read_timeout"):
        assert LINE_SETTINGS[f"streaming_{name}"] > six_minutes + LINE_SETTINGS["streaming_retry_wait"]


def test_what_a_kit_has_set_itself_stays(tmp_path: Path):
    target = tmp_path / FILE
    target.write_text(json.dumps({"streaming_retry_wait": 7}))
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / FILE).write_text(json.dumps({"streaming_retry_wait": 8, "max_message_size": 1}))
    told = write_line_settings(tmp_path)
    assert told
    assert json.loads(target.read_text()) == LINE_SETTINGS | {
        "streaming_retry_wait": 7,
        "max_message_size": 1,
    }
    assert write_line_settings(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_file_that_flare_could_not_read_is_left_alone(tmp_path: Path, content: str):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match="expected"):
        write_line_settings(tmp_path)
    assert (tmp_path / FILE).read_text() == content


def test_a_job_cannot_bring_its_own(tmp_path: Path):
    """FLARE loads all modules below a folder that ``comm_driver_path`` names, when a job's process starts."""
    for folder in ("00000000-job/app_site-1", "local", "zzzzzzzz-job/app_site-1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / FILE).write_text(json.dumps({"comm_driver_path": "anywhere"}))
    (tmp_path / "local" / FILE).unlink()
    write_line_settings(tmp_path)
    _, found = ConfigFactory.search_config_format(FILE.name, [str(tmp_path)])
    assert found == str(tmp_path / FILE)
    assert "comm_driver_path" not in json.loads(Path(found).read_text())


def test_allow_gives_them_to_kits_and_not_to_a_simulator(tmp_path: Path):
    (tmp_path / "kit/startup").mkdir(parents=True)
    (tmp_path / "kit/startup/fed_client.json").write_text("{}")
    (tmp_path / "ws").mkdir()
    (allowed,) = allow(tmp_path / "kit")
    assert "for slow lines" in allowed.outcome
    assert json.loads((tmp_path / "kit" / FILE).read_text()) == LINE_SETTINGS
    (again,) = allow(tmp_path / "kit")
    assert "for slow lines" not in again.outcome
    allow(tmp_path / "ws", new=True)
    assert not (tmp_path / "ws" / FILE).exists()
