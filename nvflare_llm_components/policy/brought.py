"""What a model that a job brings may hold beside its weights: data alone, of a bounded effect.

A chat template and a tokenizer's regular expression are programs. So are the other steps of a tokenizer,
where each makes the text longer: of a letter, thirty steps make gigabytes. A site's own models may have all
that.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from nvflare_llm_components.policy.json_file import read_json
from nvflare_llm_components.policy.schema import Names, PolicyError, number, refuse_unlisted
from nvflare_llm_components.tensors.links import links_in
from nvflare_llm_components.tensors.text import printable

_FILES = (
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
_SMALL_BYTES = 2**20
_MAX_ADDED = 1000  # tokens: each is looked for in every row, and costs time to add
_MAX_TOKEN = 256  # characters
_MAX_ITEMS, _MAX_TEXT = 8, 64  # of a list and of a text in a tokenizer's steps
_MAX_GROWTH = 16
_MAX_WORD = 1000  # WordPiece takes the square of it

_PROGRAMS = ("chat_template", "auto_map", "tokenizer_file", "vocab_file", "merges_file")
_CLASSES = "GPT2Tokenizer LlamaTokenizer Qwen2Tokenizer GemmaTokenizer GPTNeoXTokenizer PreTrainedTokenizer"
_FLAGS = (
    "add_bos_token add_eos_token add_prefix_space clean_up_tokenization_spaces do_lower_case is_local legacy "
    "local_files_only spaces_between_special_tokens split_special_tokens use_default_system_prompt"
)
_TEXT = Annotated[str, StringConstraints(max_length=_MAX_TOKEN)]
_TOKEN = _TEXT | Annotated[dict[str, bool | int | _TEXT | None], Field(max_length=16)]
_TOKENS: Any = (
    Annotated[list[_TOKEN], Field(max_length=_MAX_ADDED)]
    | Annotated[dict[str, _TOKEN], Field(max_length=_MAX_ADDED)]
)
_TOKENIZER_CONFIG: dict[str, Any] = {
    **dict.fromkeys((f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "cls", "sep", "mask")), _TOKEN),
    **dict.fromkeys(_FLAGS.split(), bool),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"), _TOKENS),
    **dict.fromkeys(("padding_side", "truncation_side"), Literal["left", "right"]),
    "backend": Literal["tokenizers"],
    "errors": Literal["replace", "strict", "ignore"],
    "model_input_names": Names,
    "model_max_length": number(0, 1e31),
    "tokenizer_class": Literal[
        ("TokenizersBackend", *_CLASSES.split(), *(f"{name}Fast" for name in _CLASSES.split()))
    ],
}
_STEPS = {
    "normalizer": "NFC NFD NFKC NFKD Lowercase Strip StripAccents Nmt BertNormalizer Prepend Replace "
    "ByteLevel",
    "pre_tokenizer": "ByteLevel Whitespace WhitespaceSplit BertPreTokenizer Metaspace Punctuation Digits "
    "CharDelimiterSplit Split UnicodeScripts",
    "post_processor": "ByteLevel TemplateProcessing BertProcessing RobertaProcessing",
    "decoder": "ByteLevel WordPiece Metaspace BPEDecoder ByteFallback Fuse Strip Replace",
}
_REPEATED = ("Replace", "Split", "Digits", "Strip")
_AT_HOME = "A model that needs more lies at the site, below NVFLARE_LLM_MODEL."


def refuse_programs(folder: Path) -> None:
    """Check all files of a model that a job brought, but its ``config.json``.

    Raises:
        PolicyError: naming the file, what is in it, and what to do.
    """
    _check_names(folder)
    _check_settings(folder)
    tokenizer = read_json(folder / "tokenizer.json")
    for part, kinds in _STEPS.items():
        _check_steps(f"tokenizer.json: {part}", tokenizer.get(part), kinds.split())
    _check_vocabulary(tokenizer)


def refuse_links(folder: Path) -> None:
    """Check that a job brought all of a model's files itself: what a link names is this machine's.

    Raises:
        PolicyError: naming the link.
    """
    for link in links_in(folder):
        raise _refused("its files", "data that the job brings", f"the link {link.relative_to(folder)}")


def _check_names(folder: Path) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    surplus = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _FILES)]
    if surplus:
        raise PolicyError(
            f"A model that a job brings: expected data alone, found {printable(surplus[0], 80)}. "
            "Templates and scripts are programs; a model that needs them lies at the site, below "
            "NVFLARE_LLM_MODEL."
        )


def _check_settings(folder: Path) -> None:
    for name in ("generation_config.json", "adapter_config.json", "federation.json"):
        read_json(folder / name, _SMALL_BYTES)
    settings = read_json(folder / "tokenizer_config.json", _SMALL_BYTES)
    found = [key for key in _PROGRAMS if settings.get(key)]
    if found or "Regex" in _keys(read_json(folder / "tokenizer.json")):
        raise PolicyError(
            f"A model that a job brings: expected a tokenizer without programs and paths, found "
            f"{found[0] if found else 'a regular expression'} in it. {_AT_HOME}"
        )
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    if has_tokenizer and settings.get("tokenizer_class") is None:
        raise _refused("tokenizer_config.json: tokenizer_class", "one", "none")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        given = {key: value for key, value in read_json(folder / name, _SMALL_BYTES).items() if value}
        refuse_unlisted(f"{name} of a model that a job brings", given, _TOKENIZER_CONFIG)
    _check_count("added_tokens.json", read_json(folder / "added_tokens.json", _SMALL_BYTES))


def _check_steps(where: str, part: Any, kinds: list[str]) -> None:
    for node in _nodes(part):
        if isinstance(node, list) and len(node) > _MAX_ITEMS:
            raise _refused(where, f"lists of at most {_MAX_ITEMS}", len(node))
        if isinstance(node, str) and len(node) > _MAX_TEXT:
            raise _refused(where, f"texts of at most {_MAX_TEXT} characters", len(node))
    steps = [node for node in _nodes(part) if isinstance(node, dict) and isinstance(node.get("type"), str)]
    found = [step["type"] for step in steps]
    for kind in found:
        if kind not in (*kinds, "Sequence"):
            raise _refused(where, f"steps among {', '.join(kinds)}", kind)
        if kind not in _REPEATED and found.count(kind) > 1:
            raise _refused(where, f"{kind} once", found.count(kind))
    growth = 1.0
    for step in steps:
        growth *= _growth(step) if step["type"] == "Replace" else 1
    if growth > _MAX_GROWTH:
        raise _refused(where, f"texts that grow to at most {_MAX_GROWTH} times", growth)


def _growth(step: dict[str, Any]) -> float:
    pattern, content = step.get("pattern"), step.get("content")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(replaced, str) or not isinstance(content, str) or not replaced:
        return float("inf")
    return max(1.0, len(content) / len(replaced))


def _check_vocabulary(tokenizer: dict[str, Any]) -> None:
    _check_count("tokenizer.json: added_tokens", tokenizer.get("added_tokens") or [])
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        return
    longest = model.get("max_input_chars_per_word") or 0
    if not isinstance(longest, int) or longest > _MAX_WORD:
        raise _refused("tokenizer.json: model: max_input_chars_per_word", f"at most {_MAX_WORD}", longest)
    vocabulary = model.get("vocab") or ()
    tokens = (entry[0] if isinstance(entry, list) and entry else entry for entry in vocabulary)
    settings = (value for key, value in model.items() if key not in ("vocab", "merges"))
    for token in (*tokens, *settings):
        if isinstance(token, str) and len(token) > _MAX_TOKEN:
            raise _refused("tokenizer.json: model", f"tokens of at most {_MAX_TOKEN} characters", len(token))


def _check_count(where: str, tokens: Any) -> None:
    if not isinstance(tokens, list | dict) or len(tokens) > _MAX_ADDED:
        found = len(tokens) if isinstance(tokens, list | dict) else type(tokens).__name__
        raise _refused(where, f"at most {_MAX_ADDED} tokens", found)


def _refused(where: str, expected: str, found: object) -> PolicyError:
    return PolicyError(
        f"A model that a job brings: {where}: expected {expected}, found {printable(found, 60)}. {_AT_HOME}"
    )


def _keys(node: dict[str, Any]) -> set[str]:
    """All keys of a tokenizer's steps; its vocabulary, which is large, has none of them."""
    steps = [value for name, value in node.items() if name != "model"]
    return {key for value in _nodes(steps) if isinstance(value, dict) for key in value}


def _nodes(root: Any) -> Iterator[Any]:
    """A value of JSON, and every value in it."""
    pending = [root]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)
