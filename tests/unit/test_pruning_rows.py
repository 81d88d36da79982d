"""Rows against what they stand for: every target is predicted from its own sequence, and nothing else."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gisp_tasks.pruning.objectives import CalibrationSet, Candidate, Item, margin, perplexity
from gisp_tasks.pruning.rows import Row, micro_batches, rows_of

MANY = settings(max_examples=200, deadline=None, derandomize=True)
FEW_TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@st.composite
def items(draw: st.DrawFn) -> list[Item]:
    """Items of few different tokens, so that candidates share what they can by chance too."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        shared = draw(st.lists(st.integers(0, 2), max_size=4))
        candidates = []
        for _ in range(draw(st.integers(2, 4))):
            prompt = [*shared, *draw(FEW_TOKENS)]
            candidates.append(Candidate(np.array([*prompt, *draw(FEW_TOKENS)]), len(prompt)))
        made.append(Item(candidates[0], tuple(candidates[1:])))
    return made


def seen(row: Row, place: int) -> list[int]:
    """The tokens that a place of a row may see, in order of their positions."""
    visible = [
        i
        for i in range(len(row.tokens))
        if row.segments[i] in (0, row.segments[place]) and row.positions[i] <= row.positions[place]
    ]
    assert [int(row.positions[i]) for i in visible] == list(range(len(visible)))
    return [int(row.tokens[i]) for i in visible]


def targets_of(calibration: CalibrationSet, row: Row, members: range) -> tuple[list, list]:
    """(context, target, weight) of a row, and of the sequences that it stands for."""
    found = [
        (seen(row, place), int(target), float(weight))
        for place, target, weight in zip(row.predictors, row.targets, row.weights, strict=True)
    ]
    expected = []
    for member in members:
        start, end = calibration.spans[member]
        tokens, weights = calibration.tokens[start:end].tolist(), calibration.weights[start:end].tolist()
        expected += [(tokens[:t], tokens[t], weights[t]) for t in range(len(tokens)) if weights[t] != 0]
    return found, expected


@MANY
@given(items())
def test_every_target_of_an_item_is_predicted_from_its_own_sequence(drawn: list[Item]):
    calibration = margin(drawn)
    rows = rows_of(calibration)
    assert len(rows) == len(drawn) == calibration.num_groups
    first = 0
    for row, item in zip(rows, drawn, strict=True):
        members = range(first, first + len(item.candidates))
        first = members.stop
        found, expected = targets_of(calibration, row, members)
        assert found == expected
        sequences = [candidate.tokens.tolist() for candidate in item.candidates]
        shortest = min(candidate.prompt_length for candidate in item.candidates)
        shared = 0
        while shared < shortest and len({sequence[shared] for sequence in sequences}) == 1:
            shared += 1
        assert len(row.tokens) == shared + sum(len(sequence) - shared for sequence in sequences)


def test_a_sequence_of_its_own_is_its_row():
    calibration = perplexity([np.array([5, 6, 7, 8]), np.array([9, 4])], [2, 1])
    first, second = rows_of(calibration)
    assert first.tokens.tolist() == [5, 6, 7, 8]
    assert first.positions.tolist() == [0, 1, 2, 3]
    assert first.segments.tolist() == [1, 1, 1, 1]
    assert (first.predictors.tolist(), first.targets.tolist()) == ([1, 2], [7, 8])
    assert (second.predictors.tolist(), second.targets.tolist(), second.weights.tolist()) == ([0], [4], [0.5])


@MANY
@given(st.lists(st.integers(2, 30), min_size=1, max_size=30), st.integers(1, 100))
def test_micro_batches_hold_what_fits(lengths: list[int], budget: int):
    rows = rows_of(perplexity([np.full(length, i) for i, length in enumerate(lengths)]))
    cut = micro_batches(rows, budget)
    together = [row for batch in cut for row in batch]
    assert sorted(map(id, together)) == sorted(map(id, rows))
    assert [len(row.tokens) for row in together] == sorted(lengths, reverse=True)
    for number, batch in enumerate(cut):
        longest = len(batch[0].tokens)
        assert len(batch) == 1 or len(batch) * longest <= budget
        if number + 1 < len(cut):
            assert (len(batch) + 1) * longest > budget, "one more would have fitted"


def test_equal_lengths_stay_in_order():
    rows = rows_of(perplexity([np.full(16, i) for i in range(7)]))
    assert [[int(row.tokens[0]) for row in batch] for batch in micro_batches(rows, 50)] == [[0, 1, 2], [3, 4, 5], [6]]
