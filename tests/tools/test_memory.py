import io

import pytest
from rich.console import Console

from nvflare_llm_components.tools.memory import show_memory
from tests.tiny import save_tiny_model


def test_the_table_fits_a_terminal_and_has_a_line_for_each_way(tmp_path):
    told = io.StringIO()
    show_memory(str(save_tiny_model(tmp_path / "m")), None, 2, 16, 2, console=Console(file=told, width=80))
    lines = told.getvalue().splitlines()
    assert [line.split()[1::2][:2] for line in lines if line.startswith("│")] == [
        [sharding, checkpoints] for sharding in ("none", "full") for checkpoints in ("no", "yes")
    ]
    assert "…" not in told.getvalue()


def test_an_adapter_and_another_dtype(tmp_path):
    told = io.StringIO()
    peft = '{"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}'
    model = str(save_tiny_model(tmp_path / "m"))
    show_memory(model, peft, 2, 16, dtype="bfloat16", console=Console(file=told, width=80))
    assert "bfloat16" in told.getvalue()


@pytest.mark.parametrize("wrong", [{"dtype": "int4"}, {"optim": "lion"}])
def test_what_is_not_known_is_named(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"found.*{next(iter(wrong.values()))}"):
        show_memory(str(tmp_path), **wrong)
