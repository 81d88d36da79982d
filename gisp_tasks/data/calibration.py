"""Calibration sequences: drawn from a source by a seed, tokenized, weighted, and kept with a record of all that."""

import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.data import items, sources, token_files
from gisp_tasks.data.sources import Source, SourceFile
from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.pruning.objectives import CalibrationSet, Item, margin, perplexity
from gisp_tasks.recipe import CalibrationSection
from gisp_tasks.refs import canonical_json

logger = logging.getLogger(__name__)

Sequences = Sequence[NDArray[np.integer[Any]]]
_MAX_SHORT_DRAWS = 10_000
_DTYPES = {
    "tokens": np.dtype(np.int32),
    "spans": np.dtype(np.int64),
    "weights": np.dtype(np.float64),
    "groups": np.dtype(np.int64),
}


@dataclass(frozen=True)
class Calibration:
    """A calibration set and where it came from.

    Args:
        set: tokens, spans, weights and groups.
        description: JSON-ready record: source, draw, tokenizer, counts.
    """

    set: CalibrationSet
    description: dict[str, Any]


@dataclass(frozen=True)
class _Draw:
    """What a sampler returns.

    Args:
        sequences: S arrays of token ids.
        method: one sentence that says how they were drawn.
        prompt_lengths: leading tokens of each sequence that are no targets; None: the first only.
        counts: how much there was to draw from, and what was left out.
        items: what the sequences are candidates of; None: they stand for themselves.
    """

    sequences: Sequences
    method: str
    prompt_lengths: list[int] | None = None
    counts: dict[str, Any] = field(default_factory=dict)
    items: list[Item] | None = None

    def weighted(self) -> CalibrationSet:
        """The objective that the data is for: the margin of items, else perplexity."""
        return perplexity(self.sequences, self.prompt_lengths) if self.items is None else margin(self.items)


def build(section: CalibrationSection, *, tokenizer: Any, vocab_size: int) -> Calibration:
    """Draw, tokenize and weight the calibration sequences that a recipe asks for.

    Args:
        section: what is asked for.
        tokenizer: the model's, from transformers; called as it is, so it adds the special tokens it always adds.
        vocab_size: rows of the model's embedding.

    Raises:
        InputError: the data cannot be had or read, is too short for what is asked, or does not fit the model.
        RetryableError: a download broke off.
    """
    source, description, draw = _drawn(section, tokenizer)
    _require_vocabulary(draw.sequences, vocab_size, source)
    calibration_set = draw.weighted()
    description |= {
        "dataset": section.dataset,
        "sampling": draw.method,
        "seed": section.seed,
        "sequences": calibration_set.num_sequences,
        "sequence_length": section.sequence_length,
        "num_tokens": len(calibration_set.tokens),
        "num_targets": calibration_set.num_targets,
        **draw.counts,
    }
    logger.info("calibration: %d sequences, %d tokens", calibration_set.num_sequences, len(calibration_set.tokens))
    return Calibration(calibration_set, description)


def save(calibration: Calibration, path: Path) -> None:
    """Write the set to ``path`` (.safetensors) and its description beside it (.json); equal sets, equal bytes."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(getattr(calibration.set, name)) for name in _DTYPES}, path)
    path.with_suffix(".json").write_bytes(canonical_json(calibration.description))


def load(path: Path) -> Calibration:
    """The inverse of `save`.

    Raises:
        IntegrityError: a file is missing or does not hold what `save` writes.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        description = json.loads(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise IntegrityError(f"calibration {path.name}: not readable ({error})") from error
    found = {name: array.dtype for name, array in arrays.items()}
    if found != _DTYPES:
        raise IntegrityError(f"calibration {path.name}: holds {found}, expected {_DTYPES}")
    of_tokens, of_sequences = arrays["tokens"].shape, arrays["groups"].shape
    if arrays["weights"].shape != of_tokens or arrays["spans"].shape != (*of_sequences, 2):
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        raise IntegrityError(f"calibration {path.name}: the shapes {shapes} do not belong together")
    return Calibration(CalibrationSet(**arrays), description)


def _drawn(section: CalibrationSection, tokenizer: Any) -> tuple[str, dict[str, Any], _Draw]:
    """Name of the source, the record of source and tokenizer, and the draw."""
    if section.dataset == "tokens":
        path = Path(str(section.path))
        array = token_files.read(path)
        draw = _leading(array, section)
        file = SourceFile.of(path, path.name)
        source = Source("tokens", "all", "file", None, (file,))
        return f"the file {file.name}", {"source": source.describe(num_rows=len(array)), "tokenizer": None}, draw
    if section.dataset in _ITEMS:
        drawn = _ITEMS[section.dataset](section, tokenizer)
        candidates = [candidate.tokens for item in drawn.items for candidate in item.candidates]
        described = _describe_tokenizer(tokenizer) if drawn.tokenized_here else None
        source_name = "the tokenizer" if described else "the file of items"
        record = {"source": drawn.source, "tokenizer": described}
        return source_name, record, _Draw(candidates, drawn.method, counts=drawn.counts, items=drawn.items)
    if section.dataset == "text":
        source = sources.from_file(Path(str(section.path)))
    else:
        source = sources.find(section.dataset, section.split)
    draw = _SAMPLERS[section.dataset](source, section, tokenizer)
    return "the tokenizer", {"source": source.describe(), "tokenizer": _describe_tokenizer(tokenizer)}, draw


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    return {
        "class": type(tokenizer).__name__,
        "entries": len(tokenizer),
        "special_tokens": "as the tokenizer adds them to every text it is given",
        "special_tokens_of_empty_text": [int(token) for token in encode(tokenizer, "")],
    }


def encode(tokenizer: Any, text: str) -> NDArray[np.int64]:
    """Token ids of a text, with the special tokens that the tokenizer always adds."""
    # verbose=False: a text longer than the model's context is expected here, not worth a warning.
    return np.asarray(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"], dtype=np.int64)


def _document_windows(source: Source, section: CalibrationSection, tokenizer: Any) -> _Draw:
    """METHOD A6, C4: documents at random until one is long enough, then a window at random in it.

    The order of the draws is the reference's, so that equal seeds give equal windows.
    """
    texts = source.texts()
    length = section.sequence_length
    rng = random.Random(section.seed)  # noqa: S311 - a reproducible draw, not a secret
    too_short: dict[int, int] = {}
    sequences: list[NDArray[np.int64]] = []
    failures = 0
    while len(sequences) < section.sequences:
        if len(too_short) == len(texts) or failures == _MAX_SHORT_DRAWS:
            raise _no_long_document(section, len(texts), too_short)
        document = rng.randint(0, len(texts) - 1)
        failures += 1
        if document in too_short:
            continue
        tokens = encode(tokenizer, texts[document])
        if len(tokens) <= length:
            too_short[document] = len(tokens)
            continue
        failures = 0
        start = rng.randint(0, len(tokens) - length - 1)
        sequences.append(tokens[start : start + length])
    method = "documents drawn with replacement until one is longer than a sequence, then a window of it"
    return _Draw(sequences, method, counts={"documents": len(texts), "documents_too_short": len(too_short)})


def _no_long_document(section: CalibrationSection, num_documents: int, too_short: dict[int, int]) -> InputError:
    if not too_short:
        return InputError(f"calibration.dataset={section.dataset}: no documents were found; use another data set")
    return InputError(
        f"calibration.sequence_length={section.sequence_length}: documents must have more tokens than that, and "
        f"{len(too_short)} different ones, drawn from {num_documents}, have at most {max(too_short.values())}. "
        f"Allowed is less than the longest; lower calibration.sequence_length, or use another data set"
    )


def _text_windows(source: Source, section: CalibrationSection, tokenizer: Any) -> _Draw:
    """Non-overlapping windows of the running text, drawn without replacement and kept in text order."""
    tokens = encode(tokenizer, source.text())
    length = section.sequence_length
    num_windows = len(tokens) // length
    if num_windows < section.sequences:
        raise InputError(
            f"calibration.sequences={section.sequences} of sequence_length={length}: the text has {len(tokens)} "
            f"tokens, which make {num_windows} such sequences. Allowed is at most that many; lower "
            f"calibration.sequences or calibration.sequence_length, or use a longer text"
        )
    rng = random.Random(section.seed)  # noqa: S311 - a reproducible draw, not a secret
    chosen = sorted(rng.sample(range(num_windows), section.sequences))
    sequences = [tokens[window * length : (window + 1) * length] for window in chosen]
    method = "running text cut in non-overlapping windows, drawn without replacement, in text order"
    return _Draw(sequences, method, counts={"windows": num_windows})


def _solved_problems(source: Source, section: CalibrationSection, tokenizer: Any) -> _Draw:
    """One sequence a problem, prompted as lm-eval prompts it; the loss is on the answer only."""
    items = source.items()
    rng = random.Random(section.seed)  # noqa: S311 - a reproducible draw, not a secret
    chosen: dict[int, tuple[NDArray[np.int64], int]] = {}
    too_long = 0
    for index in rng.sample(range(len(items)), len(items)):
        tokens, prompt_length = encode_problem(tokenizer, *items[index])
        if len(tokens) > section.sequence_length:
            too_long += 1
            continue
        chosen[index] = tokens, prompt_length
        if len(chosen) == section.sequences:
            break
    if len(chosen) < section.sequences:
        raise InputError(
            f"calibration.sequences={section.sequences}: {source.dataset}/{source.split} has {len(items)} items, of "
            f"which {len(chosen)} have at most sequence_length={section.sequence_length} tokens. Allowed is at most "
            f"{len(chosen)}; lower calibration.sequences or raise calibration.sequence_length"
        )
    kept = [chosen[index] for index in sorted(chosen)]
    method = "items drawn without replacement, longer ones skipped, in file order; the answer's tokens are targets"
    counts = {"items": len(items), "items_too_long": too_long}
    return _Draw([tokens for tokens, _ in kept], method, [prompt for _, prompt in kept], counts)


def encode_problem(tokenizer: Any, question: str, answer: str) -> tuple[NDArray[np.int64], int]:
    """Tokens of the whole item, and how many of them belong to the prompt alone.

    The whole is tokenized at once, as a model meets it. A token that straddles the boundary, and a closing token
    that the tokenizer puts after the prompt alone, end the common part, and so count to the answer.
    """
    prompt = f"Question: {question}\nAnswer:"
    tokens = encode(tokenizer, f"{prompt} {answer}")
    prompt_tokens = encode(tokenizer, prompt)
    shorter = min(len(tokens), len(prompt_tokens))
    differing = np.flatnonzero(tokens[:shorter] != prompt_tokens[:shorter])
    return tokens, int(differing[0]) if len(differing) else shorter


def _leading(array: NDArray[np.int64], section: CalibrationSection) -> _Draw:
    """The first rows of a token file, cut to the length asked for; shorter or fewer ones stay as they are."""
    rows = array[: section.sequences, : section.sequence_length]
    return _Draw(list(rows), "the file's first rows, as they are", counts={"tokens_a_sequence": rows.shape[1]})


def _require_vocabulary(sequences: Sequences, vocab_size: int, source: str) -> None:
    highest = max(int(tokens.max()) for tokens in sequences)
    if highest >= vocab_size:
        raise InputError(
            f"calibration: {source} does not fit the model: token id {highest} was found, and the model's embedding "
            f"has {vocab_size} rows. Allowed are ids 0 to {vocab_size - 1}; use the tokenizer of this very model"
        )


_SAMPLERS: dict[str, Callable[[Source, CalibrationSection, Any], _Draw]] = {
    "c4": _document_windows,
    "wikitext2": _text_windows,
    "embedded": _text_windows,
    "text": _text_windows,
    "gsm8k": _solved_problems,
    "embedded_arithmetic": _solved_problems,
}
_ITEMS: dict[str, Callable[[CalibrationSection, Any], items.ItemDraw]] = {
    "commonsense_qa": items.draw_commonsense_qa,
    "items": items.draw_file,
}
