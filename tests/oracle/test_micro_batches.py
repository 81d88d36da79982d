"""How a set is cut into micro-batches does not decide what is removed: whole trajectories to 50 %."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from gisp_tasks.data.items import encode_pairs
from gisp_tasks.data.multiple_choice import questions
from gisp_tasks.pruning import importance, objectives
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.ranking import Limits, next_removals
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.schedule import step_targets
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.pruning.surgery import slice_model

LIMITS = Limits(np.array([False] * 4 + [True]), 1, 16, 1)


def trajectory(stories: Any, dtype: torch.dtype, calibration: CalibrationSet, max_tokens: int) -> np.ndarray:
    """(kind, layer, index) of every removal of three steps to 50 %."""
    geometry, model = geometry_of(stories.config), stories.load(dtype)
    settings = ScoringSettings(LIMITS.protected, "elements", max_tokens)
    order, held = RemovalOrder.empty(), KeepSets.everything(geometry)
    for step, target in enumerate(step_targets(3, 0.5), 1):
        keep = order.keep_sets(geometry)
        slice_model(model, geometry, now=held, wanted=keep)
        held = keep
        scores = importance.score(model, keep, geometry, calibration, settings).scores
        order = order.extend(next_removals(scores, order.removals, geometry, LIMITS, target), step)
    return np.stack([order.removals.kinds, order.removals.layers, order.removals.indices], axis=1)


@pytest.fixture(scope="module")
def tokenizer(stories: Any) -> Any:
    return AutoTokenizer.from_pretrained(stories.path)


@pytest.fixture(scope="module")
def items(tokenizer: Any, testdata: Any) -> list[objectives.Item]:
    """Real questions: a common prompt (ARC), and prompts that differ (WinoGrande)."""
    drawn = []
    for task, count in (("arc_easy", 12), ("winogrande", 6)):
        rows = pyarrow.parquet.read_table(testdata / f"data/{task}/train.parquet").to_pylist()[:count]
        drawn += [encode_pairs(tokenizer, q.pairs, q.correct) for q in questions(task, rows, origin=task)]
    return drawn


@pytest.fixture(scope="module")
def texts(tokenizer: Any, testdata: Any) -> list[np.ndarray]:
    rows = pyarrow.parquet.read_table(testdata / "data/tinystories/validation.parquet")["text"].to_pylist()[:12]
    return [np.array(tokenizer(text)["input_ids"][: 40 + 4 * i], dtype=np.int32) for i, text in enumerate(rows)]


@pytest.mark.parametrize(("data", "objective"), [("items", objectives.margin), ("texts", objectives.perplexity)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_trajectory_does_not_depend_on_the_cut(request, stories, data, objective, dtype, float64_norms):
    drawn: Sequence[Any] = request.getfixturevalue(data)
    # One row alone, which needs no padding; then several, in two orders.
    expected = trajectory(stories, dtype, objective(drawn), 1)
    assert len(expected) > 300
    for others, max_tokens in ((drawn, 600), (drawn[::-1], 2048)):
        found = trajectory(stories, dtype, objective(others), max_tokens)
        if dtype == torch.float64:
            np.testing.assert_array_equal(found, expected)
            continue
        differing = set(map(tuple, found.tolist())) ^ set(map(tuple, expected.tolist()))
        assert len(differing) <= 0.001 * (len(found) + len(expected))
