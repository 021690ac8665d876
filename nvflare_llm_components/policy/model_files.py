"""What a model's folder may hold: sizes that its files bear out, and no program.

A configuration of a few hundred bytes may ask for a million layers, or name a kernel on the hub to download
and run. A chat template and a tokenizer's regular expression are programs: the site's own models may have
them, a model that a job brings may not.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nvflare_llm_components.policy.json_file import read_json
from nvflare_llm_components.policy.schema import PolicyError, refuse_unlisted
from nvflare_llm_components.policy.training import ATTENTION, QUANTIZATION
from nvflare_llm_components.tensors.text import printable

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_BOUNDS = {
    **dict.fromkeys(_LAYERS, 1024),
    **dict.fromkeys(_WIDTHS, 2**17),
    "vocab_size": 2**22,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), 2**20),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"), 2**12),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 2**12),
    "head_dim": 2**14,
    "max_position_embeddings": 2**26,
    **dict.fromkeys(("n_positions", "n_ctx"), 2**15),  # old models keep a square mask of it
}
_KERNELS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
_BROUGHT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "adapter_config.json",
    "federation.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
_PROGRAMS = ("chat_template", "auto_map", "tokenizer_file", "vocab_file", "merges_file")


def check_model_folder(folder: Path, *, is_brought: bool, is_trained: bool) -> None:
    """Check a folder before anything of it is opened; a missing one is left to whoever opens it.

    Args:
        folder: of the model.
        is_brought: whether the job brought it.
        is_trained: whether the model is about to be built from it with its weights, as a site does.

    Raises:
        PolicyError: naming the file, what is in it, and what to do.
    """
    if not folder.is_dir():
        return
    if is_brought:
        _refuse_programs(folder)
    config = read_json(folder / "config.json")
    for part in _parts(config):
        _check_numbers(folder, part)
        _check_kernels(folder, part)
    if is_trained:
        _refuse_adapter(folder)
        for part in _parts(config):
            _check_sizes(folder, part)


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration, and those of the models in it."""
    yield config
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("config") and name != "quantization_config":
            yield from _parts(value)


def _check_numbers(folder: Path, part: dict[str, Any]) -> None:
    for key, bound in _BOUNDS.items():
        values = part.get(key)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not (isinstance(value, int) and 0 <= value <= bound):
                raise PolicyError(
                    f"{folder}: config.json: {key}: expected a whole number from 0 to {bound}, "
                    f"found {printable(repr(value), 40)}."
                )


def _check_kernels(folder: Path, part: dict[str, Any]) -> None:
    for key in _KERNELS:
        chosen = part.get(key)
        for value in chosen.values() if isinstance(chosen, dict) else [chosen]:
            if value is not None and value not in ATTENTION:
                raise PolicyError(
                    f"{folder}: config.json: {key}: expected one of {', '.join(ATTENTION)}, found "
                    f"{printable(repr(value), 60)}: it could download a kernel and run it. Remove the key."
                )
    quantization = part.get("quantization_config")
    if quantization is not None:
        where = f"{folder}: config.json: quantization_config"
        ours = {k: v for k, v in quantization.items() if not k.startswith("_")} if quantization else {}
        refuse_unlisted(where, ours, QUANTIZATION | {"llm_int8_enable_fp32_cpu_offload": bool})


def _check_sizes(folder: Path, part: dict[str, Any]) -> None:
    """Every model has an embedding, and a matrix of its width in each layer: its files must hold them."""
    held = _held(folder)
    width = _first(part, _WIDTHS)
    for what, needed in (
        ("vocab_size", _first(part, ("vocab_size",)) * width),
        ("layers", _first(part, _LAYERS) * width),
        ("positions", _first(part, ("n_positions",)) * width),
    ):
        if held and needed > held:
            raise PolicyError(
                f"{folder}: config.json: expected sizes that its weights bear out, found {what} x width of "
                f"{needed:,} weights, and files that hold {held:,} at most. Copy the model again."
            )


def check_borne_out(folder: Path, num_weights: int) -> None:
    """Check that a folder's files can hold the weights that its configuration asks for.

    transformers would make up what they lack, in any size.

    Raises:
        PolicyError: naming both counts.
    """
    held = _held(folder)
    if held and num_weights > held:
        raise PolicyError(
            f"{folder}: config.json: expected sizes that its weights bear out, found a model of "
            f"{num_weights:,} weights, and files that hold {held:,} at most. Copy the model again."
        )


def _held(folder: Path) -> int:
    """Weights that a folder's files hold at most: of 4 bits each."""
    return 2 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _first(part: dict[str, Any], keys: tuple[str, ...]) -> int:
    return next((int(part[key]) for key in keys if isinstance(part.get(key), int)), 0)


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise PolicyError(
            f"{folder}: expected a whole model at a site, found an adapter: its configuration would choose "
            "the model to load. Name the base model; the adapter comes from the server."
        )


def _refuse_programs(folder: Path) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    surplus = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _BROUGHT)]
    links = [name for name in names if (folder / name).is_symlink()]
    if surplus or links:
        raise PolicyError(
            f"A model that a job brings: expected data alone, found {printable((surplus + links)[0], 80)}. "
            "Templates and scripts are programs; a model that needs them lies at the site, below "
            "NVFLARE_LLM_MODEL."
        )
    settings = read_json(folder / "tokenizer_config.json")
    found = [key for key in _PROGRAMS if settings.get(key)]
    if found or "Regex" in _keys(read_json(folder / "tokenizer.json")):
        raise PolicyError(
            f"A model that a job brings: expected a tokenizer without programs and paths, found "
            f"{found[0] if found else 'a regular expression'} in it. "
            "A model that needs them lies at the site, below NVFLARE_LLM_MODEL."
        )


def _keys(node: Any) -> set[str]:
    """All keys of a tokenizer's steps; its vocabulary, which is large, has none of them."""
    found: set[str] = set()
    pending = [value for name, value in node.items() if name != "model"]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            found |= value.keys()
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return found
