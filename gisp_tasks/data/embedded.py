"""Data that needs no network: reference text that ships with CPython, and generated word problems.

Both are real inputs for every part of a run, but no stand-in for a published benchmark: reports call them by
their own names, ``embedded`` and ``embedded_arithmetic``.
"""

import platform
import re
from collections.abc import Callable

from gisp_tasks.data import arithmetic
from gisp_tasks.errors import InputError

SPLITS = ("train", "test")
_TRAIN_FRACTION = 0.8


def text_rows(split: str) -> list[dict[str, str]]:
    """One row ``{"text"}`` a topic of ``pydoc_data.topics``, in the order of the topics' keys.

    ``train`` is the first 80 % of the topics, ``test`` the rest. Topics quote each other at length, so a paragraph
    counts only where it first occurs: no paragraph of ``test`` is in ``train``.

    Raises:
        InputError: this Python was packaged without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            "dataset=embedded reads the reference text that ships with CPython (pydoc_data.topics), and this Python "
            "was packaged without it. Use a complete Python, or another data set, e.g. dataset: text with a path"
        ) from None
    keys = sorted(topics)
    seen: set[str] = set()
    texts = [_first_occurrences(topics[key], seen) for key in keys]
    first_test = int(len(keys) * _TRAIN_FRACTION)
    chosen = texts[:first_test] if split == "train" else texts[first_test:]
    return [{"text": text} for text in chosen if text]


def arithmetic_rows(split: str) -> list[dict[str, str]]:
    """Generated problems ``{"question", "answer"}``; no question of ``train`` is in ``test``."""
    test = arithmetic.problems(500, seed=2, exclude=frozenset())
    if split == "test":
        return test
    return arithmetic.problems(4000, seed=1, exclude=frozenset(row["question"] for row in test))


def file_name(dataset: str, split: str) -> str:
    """Name of the rows in records; the text is a matter of the Python release, the problems are not."""
    release = f"-cpython-{platform.python_version()}" if dataset == "embedded" else ""
    return f"{dataset}{release}/{split}.jsonl"


def _first_occurrences(topic: str, seen: set[str]) -> str:
    """The paragraphs of ``topic`` that are not in ``seen``, which grows by them; blank lines between."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", topic):
        words = " ".join(paragraph.split())
        if words and words not in seen:
            seen.add(words)
            kept.append("\n".join(line.rstrip() for line in paragraph.strip("\n").splitlines()))
    return "\n\n".join(kept)


DATASETS: dict[str, Callable[[str], list[dict[str, str]]]] = {
    "embedded": text_rows,
    "embedded_arithmetic": arithmetic_rows,
}
