"""What a manifest names as different from the reference code holds for the recipe it belongs to."""

from typing import Any

import pytest

from gisp_tasks.recipe import Recipe
from gisp_tasks.stores.manifest import deviations

SCHEDULE, COUNT, MINIMA = "linear in parameter sparsity", "count of removals is exact", "keeps a minimum"
UNIT, SOLVED = "the kv group with its k and v rows", "solved anew by least squares"
CONVERSION, FISHER, NORMALISER, MARGIN = "written as copies", "Fisher", "divided by", "Margin:"
ALWAYS = {"Scores accumulate in float32", "scored weights only", "sliced between steps", "widths of a level"}


def named(**sections: Any) -> set[str]:
    base = {
        "name": "deviations",
        "model": {"source": "model"},
        "calibration": {"dataset": "embedded"},
        "publish": {"store": "file:///tmp/store", "gate": {"max_perplexity_ratio": None}},
    }
    sentences = deviations(Recipe.parse({**base, **sections}))
    marks = ALWAYS | {SCHEDULE, COUNT, MINIMA, UNIT, SOLVED, CONVERSION, FISHER, NORMALISER, MARGIN}
    assert all(any(mark in sentence for mark in marks) for sentence in sentences)
    return {mark for mark in marks if any(mark in sentence for sentence in sentences)} - ALWAYS


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, {SCHEDULE, COUNT, MINIMA, UNIT, NORMALISER}),
        ({"pruning": {"compensation": "least_squares"}}, {SCHEDULE, COUNT, MINIMA, UNIT, NORMALISER, SOLVED}),
        ({"importance": {"granularity": "head"}}, {SCHEDULE, COUNT, MINIMA, CONVERSION, NORMALISER}),
        (
            {"importance": {"score": "gate_fisher", "normaliser": "reference"}},
            {SCHEDULE, COUNT, MINIMA, UNIT, FISHER},
        ),
        ({"importance": {"compat": "reference"}}, {CONVERSION}),
        (
            {
                "importance": {"compat": "reference"},
                "objective": "margin",
                "calibration": {"dataset": "items", "path": "a.jsonl"},
            },
            {CONVERSION, MARGIN},
        ),
    ],
)
def test_deviations_follow_the_recipe(sections: dict[str, Any], expected: set[str]):
    assert named(**sections) == expected
