"""The texts that a recipe's evaluations really read, for the comparison with what calibration really draws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from gisp_tasks.data.calibration import encode
from gisp_tasks.data.multiple_choice import TASKS, questions
from gisp_tasks.data.sources import Source
from gisp_tasks.recipe import ChoiceEvaluation, ProblemEvaluation, Recipe, TextEvaluation


@dataclass(frozen=True)
class Evaluated:
    """What one evaluation reads, within its limits.

    Args:
        passages: texts of which some words in a row are telling.
        wholes: texts that are telling as a whole only.
        files: sha256 of the files that they stand in.
    """

    passages: tuple[str, ...]
    wholes: tuple[str, ...]
    files: frozenset[str]


def evaluated_texts(recipe: Recipe, found: Mapping[str, Source], tokenizer: Any) -> dict[str, Evaluated]:
    """What each evaluation measures; solved examples, which only stand before a question, are left out.

    Args:
        recipe: its evaluations have the limits.
        found: name -> source, as `tasks.measure.evaluation_sources` returns it.
        tokenizer: the model's; limits of text are counted in its tokens.

    Raises:
        InputError: rows that cannot be read.
    """
    texts = {}
    for name, source in found.items():
        if name in _READ:
            section, read = _READ[name]
            passages, wholes = read(source, getattr(recipe.evaluation, section), tokenizer)
            files = frozenset(file.sha256 for file in source.files)
            texts[name] = Evaluated(tuple(passages), tuple(wholes), files)
    return texts


# Passages and wholes.
_Texts = tuple[list[str], list[str]]


def _running_text(source: Source, section: TextEvaluation, tokenizer: Any) -> _Texts:
    tokens = encode(tokenizer, source.text())[: section.limit_tokens]
    return [tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)], []


def _problems(source: Source, section: ProblemEvaluation, _: Any) -> _Texts:
    """Question and answer, and the question alone."""
    items = _measured_problems(source, section)
    return [text for question, answer in items for text in (question, f"{question} {answer}")], []


def _generated_problems(source: Source, section: ProblemEvaluation, _: Any) -> _Texts:
    """Whole questions: all splits are made of the same few templates, which repeat each other's words in a row."""
    return [], [question for question, _ in _measured_problems(source, section)]


def _measured_problems(source: Source, section: ProblemEvaluation) -> list[tuple[str, str]]:
    """Those that are solved and those whose solution is weighed: the first ones of both."""
    limits = (section.limit, section.limit_solutions)
    return source.items()[: None if None in limits else max(limit for limit in limits if limit is not None)]


def choices(task: str, source: Source, limit: int | None) -> _Texts:
    """Texts of the first ``limit`` questions of a multiple-choice task: the context, and it with each answer.

    BoolQ's passage is given, not asked, and its splits share passages (of the 64 real items of the test kit's train
    split, 5 have one with 1000 validation items), so its question alone counts, or passage, question and answer
    as a whole.

    Args:
        task: a key of `multiple_choice.TASKS`.
        source: its rows.
        limit: None: all.
    """
    rows = source.rows()[:limit]
    pairs = [question.pairs for question in questions(task, rows, origin=source.files[0].name)]
    texts = [text for pair in pairs for text in (*dict(pair), *(context + answer for context, answer in pair))]
    if task == "boolq":
        return [], [*(row["question"] for row in rows), *texts]
    return texts, []


def _choices(task: str, source: Source, section: ChoiceEvaluation, _: Any) -> _Texts:
    return choices(task, source, section.limit)


# Name of the source -> section of the recipe's evaluation, and how its texts are read.
_READ: dict[str, tuple[str, Callable[[Source, Any, Any], _Texts]]] = {
    "wikitext2": ("wikitext2", _running_text),
    "gsm8k": ("gsm8k", _problems),
    "embedded_text": ("embedded_text", _running_text),
    "embedded_arithmetic": ("embedded_arithmetic", _generated_problems),
    **{task: ("commonsense_qa", partial(_choices, task)) for task in TASKS},
}
