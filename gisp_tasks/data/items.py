"""Calibration items for the margin objective: a prompt with its correct and its wrong answers, drawn to a budget.

The budget is calibration.sequences x calibration.sequence_length tokens, counted over all candidates of an item, the
prompt once a candidate. Items are taken in seeded order until the next one would exceed it.
"""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gisp_tasks.data import sources
from gisp_tasks.data.multiple_choice import TASKS, questions
from gisp_tasks.data.readers import Row, read_numbered_lines
from gisp_tasks.data.sources import Source, SourceFile
from gisp_tasks.errors import InputError
from gisp_tasks.pruning.objectives import Candidate, Item
from gisp_tasks.recipe import CalibrationSection

logger = logging.getLogger(__name__)

_TEXT_KEYS = ("prompt", "correct", "wrong")
_ID_KEYS = ("prompt_ids", "correct_ids", "wrong_ids")
_ALLOWED = (
    'Allowed is {"prompt": text, "correct": text, "wrong": [text, …]} or '
    '{"prompt_ids": [id, …], "correct_ids": [id, …], "wrong_ids": [[id, …], …]}, nothing in it empty'
)
# Rows of another split in the place of one that a mirror lacks: taken only when asked for by this ending.
_STAND_IN = "_surrogate"
_METHOD = "items in seeded order until the next one would exceed the budget of tokens, longer ones skipped, "


@dataclass(frozen=True)
class ItemDraw:
    """Items and where they came from.

    Args:
        items: in the order of the tasks, and of the rows in each.
        method: one sentence that says how they were drawn.
        source: JSON-ready record of the files.
        counts: how much there was to draw from, and what was left out.
        tokenized_here: whether any of them was text.
    """

    items: list[Item]
    method: str
    source: dict[str, Any]
    counts: dict[str, Any]
    tokenized_here: bool


def draw_commonsense_qa(section: CalibrationSection, tokenizer: Any) -> ItemDraw:
    """The seven tasks of `multiple_choice`, an even share of the budget each.

    Raises:
        InputError: a task's rows cannot be had or read, or not one item of a task fits.
        RetryableError: a download broke off.
    """
    found = {task: _find(task, section.split) for task in TASKS}
    items: list[Item] = []
    counts: dict[str, Any] = {}
    for task, source in found.items():
        rows = questions(task, source.rows(), origin=source.files[0].name)
        drawn, counts[task] = _within_budget(
            len(rows),
            lambda index, rows=rows: encode_pairs(tokenizer, rows[index].pairs, rows[index].correct),  # type: ignore[misc]
            section,
            shares=len(TASKS),
            name=task,
        )
        items += drawn
    method = _METHOD + "an even share of the budget for each of seven tasks, prompts as lm-eval builds them"
    return ItemDraw(
        items,
        method,
        sources.describe_together("commonsense_qa", found, section.split),
        {"tasks": counts},
        tokenized_here=True,
    )


def _find(task: str, split: str) -> Source:
    """The split asked for; of a stand-in, the one it stands in for where the task has none."""
    if not split.endswith(_STAND_IN):
        return sources.find(task, split)
    try:
        return sources.find(task, split)
    except InputError:
        return sources.find(task, split.removesuffix(_STAND_IN))


def draw_file(section: CalibrationSection, tokenizer: Any) -> ItemDraw:
    """One's own items, from JSON lines.

    Raises:
        InputError: no such file, a line that is no item, or not one item fits.
    """
    path = Path(str(section.path))
    lines = read_numbered_lines(path)
    for number, row in lines:
        _check_line(row, f"calibration.path={path}, line {number}")

    def encode(index: int) -> Item:
        number, row = lines[index]
        if "prompt_ids" in row:
            return _item_of_ids(row)
        pairs = tuple((row["prompt"], answer) for answer in (row["correct"], *row["wrong"]))
        item = encode_pairs(tokenizer, pairs, 0)
        if any(len(candidate.tokens) == candidate.prompt_length for candidate in item.candidates):
            raise InputError(
                f"calibration.path={path}, line {number}: an answer comes to no token of its own with this model's "
                f"tokenizer. {_ALLOWED}; change the answer, or give token ids"
            )
        return item

    items, counts = _within_budget(len(lines), encode, section, shares=1, name=path.name)
    source = Source("items", "all", "file", None, (SourceFile.of(path, path.name),)).describe(num_rows=len(lines))
    return ItemDraw(items, _METHOD + "in file order", source, counts, any("prompt" in row for _, row in lines))


def encode_pairs(tokenizer: Any, pairs: tuple[tuple[str, str], ...], correct: int) -> Item:
    """Tokens of each context and continuation, as lm-eval makes them for a causal model.

    Context and whole are tokenized, and what the whole has beyond the context's length is the answer. Blanks at the
    context's end count to the answer.
    """
    candidates = []
    for context, continuation in pairs:
        shown = context.rstrip()
        continuation = context[len(shown) :] + continuation
        prompt = _encode(tokenizer, shown)
        tokens = prompt + _encode(tokenizer, shown + continuation)[len(prompt) :]
        candidates.append(Candidate(np.array(tokens, dtype=np.int64), len(prompt)))
    wrong = tuple(candidate for i, candidate in enumerate(candidates) if i != correct)
    return Item(candidates[correct], wrong)


def _encode(tokenizer: Any, text: str) -> list[int]:
    # A text that begins with the start token gets no second one.
    start = tokenizer.bos_token or tokenizer.eos_token
    special = not (start and text.startswith(start))
    tokens: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return tokens


def _within_budget(
    num_items: int, encode: Callable[[int], Item], section: CalibrationSection, *, shares: int, name: str
) -> tuple[list[Item], dict[str, int]]:
    """Items within an even share of the budget, in file order, and the counts of the draw."""
    budget = section.sequences * section.sequence_length // shares
    rng = random.Random(section.seed)  # noqa: S311 - a reproducible draw, not a secret
    chosen: dict[int, Item] = {}
    counts = {"items": num_items, "items_drawn": 0, "items_too_long": 0, "items_unusable": 0, "tokens": 0}
    first_left_out = None
    for index in rng.sample(range(num_items), num_items):
        item = encode(index)
        if any(not 1 <= c.prompt_length < len(c.tokens) for c in item.candidates):
            counts["items_unusable"] += 1
            continue
        if max(len(candidate.tokens) for candidate in item.candidates) > section.sequence_length:
            counts["items_too_long"] += 1
            continue
        size = sum(len(candidate.tokens) for candidate in item.candidates)
        if counts["tokens"] + size > budget:
            first_left_out = size
            break
        chosen[index] = item
        counts["tokens"] += size
    if not chosen:
        raise _nothing_fits(section, budget, counts, first_left_out, name)
    counts["items_drawn"] = len(chosen)
    logger.info("%s: %d of %d items, %d tokens", name, len(chosen), num_items, counts["tokens"])
    return [chosen[index] for index in sorted(chosen)], counts


def _nothing_fits(
    section: CalibrationSection, budget: int, counts: dict[str, int], first_left_out: int | None, name: str
) -> InputError:
    asked = f"calibration.sequences={section.sequences} x sequence_length={section.sequence_length}"
    if first_left_out is not None:
        return InputError(
            f"{asked}: the budget leaves {budget} tokens for {name}, and the first item drawn takes {first_left_out} "
            f"with all its candidates. Allowed is a budget that holds an item; raise calibration.sequences"
        )
    return InputError(
        f"{asked}: {name} has {counts['items']} items, of which {counts['items_too_long']} have a candidate of more "
        f"than {section.sequence_length} tokens and {counts['items_unusable']} an answer without tokens. Allowed is "
        f"data with an item that fits; raise calibration.sequence_length or use other items"
    )


def _check_line(row: Row, origin: str) -> None:
    """Refuse what is neither a text item nor one of token ids."""
    keys = _ID_KEYS if "prompt_ids" in row else _TEXT_KEYS
    fits = _is_ids if keys is _ID_KEYS else _is_text
    prompt, correct, wrong = (row.get(key) for key in keys)
    if set(row) != set(keys):
        raise InputError(f"{origin}: found the keys {', '.join(row) or 'none'}. {_ALLOWED}; correct the line")
    for key, value in zip(keys, (prompt, correct), strict=False):
        if not fits(value):
            raise InputError(f"{origin}: {key} is empty or of another kind. {_ALLOWED}; correct the line")
    if not isinstance(wrong, list) or not wrong or not all(fits(answer) for answer in wrong):
        raise InputError(f"{origin}: {keys[2]} is no list of answers, or one is empty. {_ALLOWED}; correct the line")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_ids(value: Any) -> bool:
    # type(), not isinstance(): true and false are no token ids. JSON's integers have no bound, int64 has.
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 2**63 for i in value)


def _item_of_ids(row: Row) -> Item:
    prompt = row["prompt_ids"]
    correct, *wrong = (
        Candidate(np.array(prompt + answer, dtype=np.int64), len(prompt))
        for answer in (row["correct_ids"], *row["wrong_ids"])
    )
    return Item(correct, tuple(wrong))
