"""Rows of seven multiple-choice tasks as the pairs of context and continuation that lm-eval scores.

Prompts, delimiter and choices are those of lm-eval 0.4.13 for the tasks of the same names, so that calibration sees
what evaluation asks. Deviations from the published reference code, which writes prompts of its own: a space between
prompt and answer, `` yes`` and `` no`` in lower case, and WinoGrande's answer taken from its label.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gisp_tasks.data.readers import Row
from gisp_tasks.errors import InputError


@dataclass(frozen=True)
class Question:
    """One labelled question.

    Args:
        pairs: context and continuation of each candidate, in the order of the row's choices.
        correct: index of the right one.
    """

    pairs: tuple[tuple[str, str], ...]
    correct: int


def questions(task: str, rows: list[Row], *, origin: str) -> list[Question]:
    """The questions of a task's rows, in their order.

    Args:
        task: a key of `TASKS`.
        rows: with the columns of the task's data set.
        origin: the rows' file, for messages.

    Raises:
        InputError: a row lacks a column, or its label names none of its choices.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            question = TASKS[task](row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _bad_row(task, origin, number, f"{type(error).__name__}: {error}") from None
        if not 0 <= question.correct < len(question.pairs) or len(question.pairs) < 2:
            raise _bad_row(task, origin, number, f"label {question.correct} for {len(question.pairs)} choices")
        found.append(question)
    return found


def harness_rows(task: str, rows: list[Row], *, origin: str) -> list[Row]:
    """The rows with the columns that lm-eval's task of that name reads, each checked to be a labelled question.

    Raises:
        InputError: as in `questions`.
    """
    labels = [question.correct for question in questions(task, rows, origin=origin)]
    if task != "boolq":
        return rows
    # lm-eval reads SuperGLUE's form.
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def evaluated_split(task: str, split: str) -> str:
    """The split to evaluate a task on: ``test`` only where the data set has labels in it, which lm-eval takes then."""
    return split if task in _LABELLED_TESTS else "validation"


def _bad_row(task: str, origin: str, number: int, found: str) -> InputError:
    return InputError(
        f"{origin}, row {number}: a labelled row of {task} was expected, found {found}. Every row needs the columns of "
        f"the data set and a label that is one of its choices; use a split with labels, or repair the file"
    )


def _choose(context: str, choices: list[str], correct: int) -> Question:
    return Question(tuple((context, f" {choice}") for choice in choices), correct)


def _boolq(row: Row) -> Question:
    # SuperGLUE's form has an integer `label`, the original one a truth value `answer`.
    label = row["label"] if "label" in row else row["answer"]
    return _choose(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(label))


def _piqa(row: Row) -> Question:
    return _choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _arc(row: Row) -> Question:
    choices = row["choices"]
    correct = choices["label"].index(row["answerKey"])
    return _choose(f"Question: {row['question']}\nAnswer:", choices["text"], correct)


def _openbookqa(row: Row) -> Question:
    choices = row["choices"]
    return _choose(row["question_stem"], choices["text"], choices["label"].index(row["answerKey"].lstrip()))


def _hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _choose(_without_markup(context), [_without_markup(ending) for ending in row["endings"]], int(row["label"]))


def _without_markup(text: str) -> str:
    """WikiHow's marks in brackets taken out; runs of blanks are halved once, as lm-eval does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _winogrande(row: Row) -> Question:
    """Partial evaluation: each option completes the context, and what follows the gap is asked of both."""
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError("no gap '_' in the sentence")
    pairs = tuple((before + row[option], f" {after.strip()}") for option in ("option1", "option2"))
    return Question(pairs, ("1", "2").index(row["answer"]))


_LABELLED_TESTS = ("arc_easy", "arc_challenge", "openbookqa")
TASKS: Mapping[str, Callable[[Row], Question]] = {
    "boolq": _boolq,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "hellaswag": _hellaswag,
    "openbookqa": _openbookqa,
    "winogrande": _winogrande,
    "piqa": _piqa,
}
