"""Nothing is fetched for a model that lies at the site, and no kernel of the hub is run."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from nvflare_llm_components.tensors.errors import ReportableError
from nvflare_llm_components.tensors.hub import check_attention
from tests.tiny import save_tiny_model, write_rows

WATCHED = """
    import socket
    asked = []
    def refuse(self, address, *_):
        asked.append(address)
        raise OSError("no network in this test")
    socket.socket.connect = socket.socket.connect_ex = refuse
    def resolve(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network in this test")
    socket.getaddrinfo = resolve
"""


def run(code: str, folder: Path, **variables: str) -> str:
    (folder / "program.py").write_text(textwrap.dedent(WATCHED) + textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(folder / "program.py")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", **variables},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


KERNELS = """
    class Anything:
        def __getattr__(self, name):
            return Anything()
        def __call__(self, *given, **_):
            return given[0] if len(given) == 1 and callable(given[0]) else Anything()
        def __or__(self, other):
            return self
        def __hash__(self):
            return 0

    def get_kernel(name, *_, **__):
        open({told!r}, "w").close()
        raise FileNotFoundError(name)

    def __getattr__(name):
        return Anything()
"""


def kernels(folder: Path) -> Path:
    """A package `kernels` as transformers wants it, which tells when it is asked for one."""
    (folder / "site/kernels").mkdir(parents=True)
    code = textwrap.dedent(KERNELS).format(told=str(folder / "asked"))
    (folder / "site/kernels/__init__.py").write_text(code)
    (folder / "site/kernels-0.18.2.dist-info").mkdir()
    (folder / "site/kernels-0.18.2.dist-info/METADATA").write_text("Name: kernels\nVersion: 0.18.2\n")
    return folder / "site"


def test_a_model_at_the_site_is_built_without_a_request(tmp_path: Path):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model/generation_config.json").unlink()
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 4)
    code = f"""
        from pathlib import Path
        from nvflare_llm_components.training.build import build_trainer
        from nvflare_llm_components.training.settings import TrainingSettings
        root = Path({str(tmp_path)!r})
        settings = TrainingSettings(model_name_or_path=str(root / "model"), train_data=root / "rows.jsonl")
        build_trainer(settings, root / "out")
        print("asked", asked)
    """
    paths = str(Path(__file__).parents[2])
    assert run(code, tmp_path, PYTHONPATH=paths) == "asked []"


@pytest.fixture(scope="module")
def beside_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process found that has the package `kernels`."""
    folder = tmp_path_factory.mktemp("kernels")
    save_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", [{"text": "a"}] * 4)
    code = f"""
        import json
        from pathlib import Path
        from transformers.integrations import hub_kernels
        from transformers.utils import is_kernels_available
        from nvflare_llm_components.tensors.hub import only_for
        from nvflare_llm_components.tensors.names import meta_model
        from nvflare_llm_components.tools.sizes import meta_state_dict
        from nvflare_llm_components.training.build import build_trainer
        from nvflare_llm_components.training.settings import TrainingSettings
        root, told = Path({str(folder)!r}), Path({str(folder / "asked")!r})

        def refused(attention):
            rows, model_kwargs = root / "rows.jsonl", dict(attn_implementation=attention)
            settings = TrainingSettings(
                model_name_or_path=str(root / "model"), train_data=rows, model_kwargs=model_kwargs
            )
            try:
                build_trainer(settings, root / "out")
            except ValueError as error:
                return str(error)

        found = dict(num_sizes=len(meta_state_dict(str(root / "model"))))
        found |= dict(meta=type(meta_model(root / "model")).__name__)
        found |= dict(are_enabled=hub_kernels._kernels_enabled, requests=asked.copy())
        found |= {{name: refused(name) for name in ("flash_attention_2", "flash_attention_3")}}
        with only_for("/models/mamba"):
            found["mamba"] = hub_kernels.lazy_load_kernel("mamba-ssm")
        print(json.dumps(found | dict(are_there=is_kernels_available(), was_asked=told.exists())))
    """
    paths = f"{kernels(folder)}:{Path(__file__).parents[2]}"
    return json.loads(run(code, folder, PYTHONPATH=paths))


def test_a_kernel_is_asked_for_by_nobody(beside_kernels):
    assert beside_kernels["are_there"]
    assert not beside_kernels["was_asked"]


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_no_kernel_of_the_hub_stands_in_for_a_missing_package(attention: str, beside_kernels):
    assert beside_kernels[attention].startswith("model_kwargs.attn_implementation: expected")


def test_a_model_that_asks_for_a_kernel_by_itself_gets_none(beside_kernels):
    assert beside_kernels["mamba"] is None


def test_a_model_known_by_its_configuration_alone_is_built_without_a_kernel_or_a_request(beside_kernels):
    assert beside_kernels["meta"] == "LlamaForCausalLM"
    assert beside_kernels["num_sizes"] > 0
    assert not beside_kernels["are_enabled"]
    assert beside_kernels["requests"] == []


def test_an_attention_that_is_built_in_needs_no_package():
    check_attention({"attn_implementation": "sdpa"})
    check_attention({})
    with pytest.raises(ReportableError, match="expected the package flash_attn"):
        check_attention({"attn_implementation": "flash_attention_2"})
