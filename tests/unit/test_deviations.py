"""What a manifest names as different from the reference code holds for the recipe it belongs to."""

from typing import Any

import pytest

from gisp_tasks.recipe import Recipe
from gisp_tasks.stores.manifest import deviations

SCHEDULE, MINIMA, UNIT = "linear in parameter sparsity", "keeps a minimum", "the kv group with its k and v rows"
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
    marks = ALWAYS | {SCHEDULE, MINIMA, UNIT, CONVERSION, FISHER, NORMALISER, MARGIN}
    assert all(any(mark in sentence for mark in marks) for sentence in sentences)
    return {mark for mark in marks if any(mark in sentence for sentence in sentences)} - ALWAYS


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, {SCHEDULE, MINIMA, UNIT, NORMALISER}),
        ({"importance": {"granularity": "head"}}, {SCHEDULE, MINIMA, CONVERSION, NORMALISER}),
        (
            {"importance": {"score": "gate_fisher", "normaliser": "reference"}},
            {SCHEDULE, MINIMA, UNIT, FISHER},
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
