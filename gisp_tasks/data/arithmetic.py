"""Seeded arithmetic word problems in GSM8K's schema.

An answer is worked step by step, each step with its calculator mark (``3*4 = <<3*4=12>>12``), and ends with
``#### N``, so that GSM8K's prompt, stop words and exact-match filter fit unchanged.
"""

import operator
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
_NAMES = (
    *("Ada", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam"),
    *("Maya", "Noah", "Olga", "Pablo", "Quinn", "Rosa", "Samir", "Tara", "Uma", "Victor", "Wanda", "Yusuf"),
)
_THINGS = (
    *("apples", "marbles", "stickers", "pencils", "books", "cookies", "shells", "stamps", "buttons", "cards"),
    *("flowers", "candles", "coins", "balloons", "eggs", "oranges", "beads", "photos", "tickets", "stones"),
)


@dataclass(frozen=True)
class _Template:
    """One kind of problem.

    Args:
        question: text with ``{names}`` of numbers and of ``name``, ``other``, ``thing``.
        numbers: the range of each number that is drawn, both ends included.
        steps: ``"c = a + b"`` and the sentence that reports it, with ``{c}`` where the calculation stands; the last
            result is the answer.
        given: calculations made before the question, so that a division in ``steps`` comes out even.
    """

    question: str
    numbers: Mapping[str, tuple[int, int]]
    steps: tuple[tuple[str, str], ...]
    given: tuple[str, ...] = field(default=())


_TEMPLATES = (
    _Template(
        "{name} has {a} {thing}. {other} gives {name} {b} more. How many {thing} does {name} have now?",
        {"a": (3, 60), "b": (2, 40)},
        (("c = a + b", "{name} has {c} {thing} now."),),
    ),
    _Template(
        "{name} found {a} {thing} and gave {b} of them to {other}. How many {thing} does {name} have left?",
        {"a": (30, 90), "b": (2, 29)},
        (("c = a - b", "{name} has {c} {thing} left."),),
    ),
    _Template(
        "A box holds {a} {thing}. {name} fills {b} boxes. How many {thing} are in the boxes?",
        {"a": (3, 25), "b": (2, 12)},
        (("c = a * b", "The boxes hold {c} {thing}."),),
    ),
    _Template(
        "{name} shares {n} {thing} equally among {k} friends. How many {thing} does each friend get?",
        {"a": (2, 20), "k": (2, 12)},
        (("c = n / k", "Each friend gets {c} {thing}."),),
        given=("n = a * k",),
    ),
    _Template(
        "{name} buys {k} packs of {a} {thing} and uses {b} of them. How many {thing} are left?",
        {"k": (3, 9), "a": (6, 15), "b": (2, 17)},
        (("c = k * a", "{name} buys {c} {thing}."), ("d = c - b", "There are {d} {thing} left.")),
    ),
    _Template(
        "An adult ticket costs ${a} and a child ticket costs ${b}. {name} buys {k} adult tickets and {m} child "
        "tickets. How many dollars does {name} pay?",
        {"a": (9, 25), "b": (3, 8), "k": (2, 6), "m": (2, 6)},
        (
            ("c = a * k", "The adult tickets cost ${c}."),
            ("d = b * m", "The child tickets cost ${d}."),
            ("e = c + d", "{name} pays ${e}."),
        ),
    ),
    _Template(
        "{name} reads {a} pages on Monday and {k} times as many on Tuesday. How many pages does {name} read on both "
        "days together?",
        {"a": (5, 40), "k": (2, 5)},
        (("c = a * k", "On Tuesday {name} reads {c} pages."), ("d = a + c", "Together that is {d} pages.")),
    ),
    _Template(
        "{name} earns ${a} an hour and works {b} hours a day. How many dollars does {name} earn in {k} days?",
        {"a": (8, 30), "b": (3, 8), "k": (2, 6)},
        (("c = a * b", "{name} earns ${c} a day."), ("d = c * k", "In {k} days {name} earns ${d}.")),
    ),
    _Template(
        "{name} has ${a} and buys {k} notebooks for ${b} each. How many dollars does {name} have left?",
        {"a": (50, 100), "k": (2, 7), "b": (2, 7)},
        (("c = k * b", "The notebooks cost ${c}."), ("d = a - c", "{name} has ${d} left.")),
    ),
    _Template(
        "{n} children are put into teams of {k}. Each team gets {b} {thing}. How many {thing} are needed?",
        {"a": (2, 12), "k": (3, 9), "b": (2, 9)},
        (("c = n / k", "There are {c} teams."), ("d = c * b", "They need {d} {thing}.")),
        given=("n = a * k",),
    ),
    _Template(
        "{name} has {a} {thing}. {other} has {b} fewer than {name}. How many {thing} do they have together?",
        {"a": (20, 80), "b": (2, 19)},
        (("c = a - b", "{other} has {c} {thing}."), ("d = a + c", "Together they have {d} {thing}.")),
    ),
    _Template(
        "{name} drives {b} hours at {a} miles an hour, then {k} miles more. How many miles does {name} drive?",
        {"a": (30, 65), "b": (2, 6), "k": (5, 60)},
        (("c = a * b", "In {b} hours {name} drives {c} miles."), ("d = c + k", "In all {name} drives {d} miles.")),
    ),
    _Template(
        "{name} is {a} years old. {other} is {b} years older. How old will {other} be in {k} years?",
        {"a": (5, 40), "b": (2, 20), "k": (2, 15)},
        (("c = a + b", "{other} is {c} years old."), ("d = c + k", "In {k} years {other} will be {d}.")),
    ),
    _Template(
        "{name} packs {n} {thing} into bags of {k} and sells each bag for ${b}. {name} spent ${m} on the {thing}. "
        "How many dollars does {name} gain?",
        {"a": (4, 12), "k": (3, 10), "b": (6, 12), "m": (2, 20)},
        (
            ("c = n / k", "{name} packs {c} bags."),
            ("d = c * b", "The bags sell for ${d}."),
            ("e = d - m", "{name} gains ${e}."),
        ),
        given=("n = a * k",),
    ),
)


def problems(count: int, *, seed: int, exclude: frozenset[str]) -> list[dict[str, str]]:
    """``count`` problems ``{"question", "answer"}``; no question occurs twice or is in ``exclude``."""
    rng = random.Random(seed)  # noqa: S311 - a reproducible draw, not a secret
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = _problem(rng)
        if question not in exclude:
            found.setdefault(question, answer)
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def _problem(rng: random.Random) -> tuple[str, str]:
    template = rng.choice(_TEMPLATES)
    name, other = rng.sample(_NAMES, 2)
    words = {"name": name, "other": other, "thing": rng.choice(_THINGS)}
    numbers = {key: rng.randint(low, high) for key, (low, high) in template.numbers.items()}
    for calculation in template.given:
        _calculate(calculation, numbers)
    question = template.question.format(**words, **numbers)
    sentences = []
    for calculation, sentence in template.steps:
        result, shown = _calculate(calculation, numbers)
        sentences.append(sentence.format(**words, **{**numbers, result: shown}))
    return question, "\n".join([*sentences, f"#### {numbers[result]}"])


def _calculate(calculation: str, numbers: dict[str, int]) -> tuple[str, str]:
    """Add ``"c = a + b"`` to ``numbers``; returns the name ``c`` and the worked form ``3+4 = <<3+4=7>>7``."""
    result, _, left, sign, right = calculation.split()
    value = _OPERATIONS[sign](numbers[left], numbers[right])
    numbers[result] = value
    term = f"{numbers[left]}{sign}{numbers[right]}"
    return result, f"{term} = <<{term}={value}>>{value}"
