"""What a model's folder may hold: sizes that its files bear out, and weights that lie in it.

A configuration of a few hundred bytes may ask for a million layers, or name a kernel on the hub to download
and run; an index may name another model's weights. What a job brings is held to more: :mod:`.brought`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvflare_llm_components.policy.brought import refuse_links, refuse_programs
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
    "num_labels": 2**16,  # each gets a name
    "attention_types": 2**10,  # layers, by how often each pattern of them is repeated
}
_LARGEST = 2**31
_LARGEST_BROUGHT = 2**20
"""Of a number that we do not know: transformers makes lists of some."""
_LARGER = ("theta", "position", "_id", "length", "window", "seq", "vocab", "base")  # no list is made of these
_CONFIG_BYTES = 2**22
_KERNELS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)


def check_model_folder(folder: Path, *, is_brought: bool, is_trained: bool) -> None:
    """Check a folder before anything of it is opened; a missing one is left to whoever opens it.

    Args:
        folder: of the model.
        is_brought: whether the job brought it.
        is_trained: whether model and tokenizer are about to be built from it, as a site does.

    Raises:
        PolicyError: naming the file, what is in it, and what to do.
    """
    if not folder.is_dir():
        return
    if is_brought:
        refuse_links(folder)
        if is_trained:
            refuse_programs(folder)
    _check_index(folder)
    config = read_json(folder / "config.json", _CONFIG_BYTES)
    for part in _parts(config):
        _check_numbers(folder, part)
        _check_unknown_numbers(folder, part, _LARGEST_BROUGHT if is_brought else _LARGEST)
        _check_kernels(folder, part)
    if is_trained:
        _refuse_adapter(folder)
        for part in _parts(config):
            _check_sizes(folder, part)


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration, and every object in it: models have models in them under many names."""
    pending: list[Any] = [config]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            pending.extend(value for name, value in node.items() if name != "quantization_config")
        elif isinstance(node, list):
            pending.extend(node)


def _check_numbers(folder: Path, part: dict[str, Any]) -> None:
    for key, bound in _BOUNDS.items():
        values = _numbers(part[key]) if key == "attention_types" and key in part else part.get(key)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not (isinstance(value, int) and 0 <= value <= bound):
                raise PolicyError(
                    f"{folder}: config.json: {key}: expected a whole number from 0 to {bound}, "
                    f"found {printable(repr(value), 40)}."
                )


def _check_unknown_numbers(folder: Path, part: dict[str, Any], most: int) -> None:
    for key, value in part.items():
        bound = _LARGEST if any(word in key for word in _LARGER) else most
        for number in [] if key in _BOUNDS or isinstance(value, dict) else _numbers(value):
            if abs(number) > bound:
                raise PolicyError(
                    f"{folder}: config.json: {printable(key, 60)}: expected at most {bound:,}, "
                    f"found {printable(repr(number), 40)}."
                )


def _numbers(value: Any) -> list[int]:
    """The whole numbers of a value, and of the lists in it; objects in them are parts of their own."""
    found, pending = [], [value]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending.extend(node)
        elif isinstance(node, int):
            found.append(node)
    return found


def _check_index(folder: Path) -> None:
    """An index says in which file a weight lies: transformers follows it wherever it leads."""
    for path in folder.glob("*.index.json"):
        places = read_json(path).get("weight_map")
        for place in places.values() if isinstance(places, dict) else [places]:
            if not isinstance(place, str) or Path(place).name != place or place == "..":
                raise PolicyError(
                    f"{path}: weight_map: expected names of files beside it, found "
                    f"{printable(repr(place), 80)}. Copy the model again."
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
        ours = quantization
        if isinstance(quantization, dict):
            ours = {key: value for key, value in quantization.items() if not key.startswith("_")}
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
