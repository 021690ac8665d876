"""Nothing is fetched for a model that lies at the site, and no kernel of the hub is run."""

import subprocess
import sys
import textwrap
from pathlib import Path

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


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_no_kernel_of_the_hub_stands_in_for_a_missing_package(attention: str, tmp_path: Path):
    save_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 4)
    code = f"""
        from pathlib import Path
        from transformers.utils import is_kernels_available
        from nvflare_llm_components.training.build import build_trainer
        from nvflare_llm_components.training.settings import TrainingSettings
        root = Path({str(tmp_path)!r})
        settings = TrainingSettings(
            model_name_or_path=str(root / "model"),
            train_data=root / "rows.jsonl",
            model_kwargs={{"attn_implementation": {attention!r}}},
        )
        try:
            build_trainer(settings, root / "out")
        except ValueError as error:
            print(is_kernels_available(), error)
    """
    paths = f"{kernels(tmp_path)}:{Path(__file__).parents[2]}"
    assert run(code, tmp_path, PYTHONPATH=paths).startswith("True model_kwargs.attn_implementation: expected")
    assert not (tmp_path / "asked").exists()


def test_a_model_that_asks_for_a_kernel_by_itself_gets_none(tmp_path: Path):
    code = """
        from nvflare_llm_components.tensors.hub import only_for
        from transformers.integrations.hub_kernels import lazy_load_kernel
        with only_for("/models/mamba"):
            print("got", lazy_load_kernel("mamba-ssm"))
    """
    paths = f"{kernels(tmp_path)}:{Path(__file__).parents[2]}"
    assert run(code, tmp_path, PYTHONPATH=paths) == "got None"
    assert not (tmp_path / "asked").exists()


def test_an_attention_that_is_built_in_needs_no_package():
    check_attention({"attn_implementation": "sdpa"})
    check_attention({})
    with pytest.raises(ReportableError, match="expected the package flash_attn"):
        check_attention({"attn_implementation": "flash_attention_2"})


def test_a_model_known_by_its_configuration_alone_is_built_without_a_kernel_or_a_request(tmp_path: Path):
    code = f"""
        from pathlib import Path
        from transformers import LlamaConfig
        from nvflare_llm_components.tensors.names import meta_model
        from nvflare_llm_components.tools.sizes import meta_state_dict
        from transformers.integrations import hub_kernels
        folder = Path({str(tmp_path / "model")!r})
        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        LlamaConfig(**sizes, vocab_size=16).save_pretrained(folder)
        assert len(meta_state_dict(str(folder)))
        assert not hub_kernels._kernels_enabled
        print(type(meta_model(folder)).__name__, "asked", asked)
    """
    paths = f"{kernels(tmp_path)}:{Path(__file__).parents[2]}"
    assert run(code, tmp_path, PYTHONPATH=paths) == "LlamaForCausalLM asked []"
    assert not (tmp_path / "asked").exists()
