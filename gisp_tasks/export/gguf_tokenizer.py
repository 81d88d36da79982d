"""A tokenizer as llama.cpp keeps it: the vocabulary, how text is split, and the special tokens.

llama.cpp has each way of splitting text built in and knows it by a name, so a tokenizer is written only if its own
description is one of those whose name is known; anything else would be tokenized into other ids without a word.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from gisp_tasks.errors import InputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
# What a byte-level tokenizer splits at before it merges -> llama.cpp's name for it.
_SPLITS = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}",): "qwen2",
}
_BLANK = "\u2581"
_UNUSED_SCORE = -1e9
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unk": "unk_token", "pad": "pad_token"}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer.

    Args:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece's BPE with bytes to fall back on).
        pre: llama.cpp's name of the splitting.
        tokens: by id, as many as the model has embeddings.
        types: of each token.
        merges: in order, for ``gpt2``.
        scores: of each token, for ``llama``: the earlier it is merged, the higher.
        space_prefix: a blank is put before text, for ``llama``.
        special: ids of bos, eos, unk and pad, where there are any.
        add_bos: text begins with bos.
        add_eos: text ends with eos.
        chat_template: Jinja, if the model has one.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str] | None = None
    scores: Sequence[float] | None = None
    space_prefix: bool = False
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None


def read_vocabulary(directory: Path, *, size: int) -> Vocabulary:
    """The tokenizer of a model directory.

    Args:
        directory: holds ``tokenizer.json`` and ``tokenizer_config.json``.
        size: of the model's vocabulary; ids above the tokenizer's are written as unused.

    Raises:
        InputError: there is no ``tokenizer.json``, or llama.cpp would not tokenize as it does.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise _refusal("no tokenizer.json was found", "a model with a fast tokenizer")
    data = json.loads(path.read_text())
    model = data["model"]
    if model["type"] != "BPE":
        raise _refusal(f"the tokenizer is of the kind {model['type']}", "BPE")
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() > size:
        raise _refusal(f"the tokenizer has {tokenizer.get_vocab_size()} tokens and the model {size}", "one for each")
    tokens, types = _tokens(tokenizer, data, size)
    if _split(data) is not None:
        kind: dict[str, Any] = {"model": "gpt2", "pre": _named(data), "merges": [_merge(m) for m in model["merges"]]}
    elif model.get("byte_fallback"):
        kind = {
            "model": "llama", "pre": "default", "scores": _scores(model, tokens), "space_prefix": _space_prefix(data),
        }  # fmt: skip
    else:
        raise _refusal("the tokenizer is neither byte-level nor falls back on bytes", "these two")
    settings = _settings(directory)
    ids = {name: tokenizer.token_to_id(_text(settings.get(key))) for name, key in _SPECIAL.items()}
    special = {name: number for name, number in ids.items() if number is not None}
    bare, full = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    return Vocabulary(
        tokens=tokens,
        types=types,
        special=special,
        add_bos=len(full) > len(bare) and full[0] == special.get("bos"),
        add_eos=len(full) > len(bare) and full[-1] == special.get("eos"),
        chat_template=settings.get("chat_template"),
        **kind,
    )


def _tokens(tokenizer: Tokenizer, data: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type by id."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    unknown = data["model"].get("unk_token")
    bytes_too = data["model"].get("byte_fallback")
    for text, number in tokenizer.get_vocab(with_added_tokens=False).items():
        is_byte = bytes_too and len(text) == len("<0x00>") and text.startswith("<0x")
        tokens[number] = text
        types[number] = int(TokenType.BYTE if is_byte else TokenType.UNKNOWN if text == unknown else TokenType.NORMAL)
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        if added["content"] != unknown or not bytes_too:
            types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, types


def _split(data: Mapping[str, Any]) -> tuple[str, ...] | None:
    """How a byte-level tokenizer splits, as a key of `_SPLITS`; None if it is none."""
    pre = data.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre]) if pre else []
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    split = []
    for part in parts[:-1]:
        if part["type"] == "Digits" and part["individual_digits"]:
            split.append("digits")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            split.append(part["pattern"].get("Regex", ""))
        else:
            split.append(json.dumps(part))
    if parts[-1].get("use_regex", True):
        split.append("gpt2")
    return tuple(split)


def _named(data: Mapping[str, Any]) -> str:
    split = _split(data)
    assert split is not None
    normalizer = (data.get("normalizer") or {}).get("type")
    # llama.cpp leaves composing to whoever writes the text: nearly all of it is composed already.
    if split not in _SPLITS or normalizer not in (None, "NFC"):
        raise _refusal(
            f"the tokenizer splits text by {list(split)}, normalizer {normalizer}",
            f"the splittings that llama.cpp calls {', '.join(_SPLITS.values())}",
        )
    return _SPLITS[split]


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """SentencePiece's scores of a BPE: minus the place of the first merge that makes the token."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(model["merges"]):
        rank.setdefault(_merge(pair).replace(" ", ""), place)
    return [-float(rank[text]) if text in rank else _UNUSED_SCORE for text in tokens]


def _space_prefix(data: Mapping[str, Any]) -> bool:
    """Whether a blank is put before text; everything else about blanks must be as SentencePiece has it."""
    normalizer, pre = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    prepends = [step for step in steps if step["type"] == "Prepend" and step["prepend"] == _BLANK]
    replaces = [
        step
        for step in steps
        if step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _BLANK
    ]
    if not pre and replaces and len(prepends) + len(replaces) == len(steps):
        return bool(prepends)
    if not steps and pre.get("type") == "Metaspace" and pre["replacement"] == _BLANK and not pre.get("split", True):
        return bool(pre["prepend_scheme"] != "never")
    raise _refusal("the tokenizer treats blanks in a way of its own", "what SentencePiece does")


def _merge(pair: str | Sequence[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _settings(directory: Path) -> dict[str, Any]:
    path, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if template.is_file():
        settings["chat_template"] = template.read_text()
    return settings


def _text(token: Any) -> str:
    """A special token is written as its text or as a mapping with it."""
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _refusal(found: str, allowed: str) -> InputError:
    return InputError(
        f"a GGUF file was asked for, and {found}; allowed is {allowed}, because llama.cpp would make other tokens of "
        f"the same text. Set export.gguf: none"
    )
