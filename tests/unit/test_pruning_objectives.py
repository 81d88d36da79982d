"""Objectives as token weights."""

import numpy as np
import pytest

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.objectives import Candidate, Item, margin, perplexity


def sequences(*lengths: int) -> list[np.ndarray]:
    return [np.arange(length, dtype=np.int64) + 10 * i for i, length in enumerate(lengths)]


def test_tokens_are_laid_end_to_end():
    made = perplexity(sequences(3, 2))
    assert made.tokens.tolist() == [0, 1, 2, 10, 11]
    assert made.spans.tolist() == [[0, 3], [3, 5]]
    assert (made.tokens.dtype, made.spans.dtype, made.weights.dtype) == (np.int32, np.int64, np.float64)
    assert made.num_sequences == 2
    assert made.num_targets == 3


def test_every_sequence_weighs_the_same_whatever_its_length():
    made = perplexity(sequences(5, 2, 9))
    assert made.weights.sum() == pytest.approx(1)
    for start, end in made.spans:
        assert made.weights[start] == 0, "the first token is not predicted"
        np.testing.assert_allclose(made.weights[start + 1 : end], 1 / (3 * (end - start - 1)))


def test_sequences_of_one_length_weigh_every_target_alike():
    made = perplexity(sequences(4, 4))
    assert made.weights[made.weights > 0].tolist() == [1 / 6] * 6


def test_prompts_are_given_not_predicted():
    made = perplexity(sequences(5, 4), [3, 0])
    np.testing.assert_allclose(made.weights, [0, 0, 0, 0.25, 0.25, 0, 1 / 6, 1 / 6, 1 / 6])


def test_no_sequences_have_no_targets():
    made = perplexity([])
    assert made.num_sequences == made.num_targets == len(made.tokens) == 0


@pytest.mark.parametrize(("lengths", "prompts"), [((4, 1), None), ((4, 3), [1, 3]), ((4, 0), None), ((2, 2), [2, 5])])
def test_a_sequence_that_predicts_nothing_is_refused(lengths, prompts):
    with pytest.raises(InputError, match="nothing is predicted"):
        perplexity(sequences(*lengths), prompts)


def item(prompt: int, correct: int, *wrong: int) -> Item:
    """Of these numbers of tokens."""
    made, *others = (Candidate(np.arange(prompt + answer), prompt) for answer in (correct, *wrong))
    return Item(made, tuple(others))


def test_margin_weighs_right_answers_against_all_wrong_ones():
    made = margin([item(2, 3, 1, 2), item(1, 1, 4)])
    third = 1 / 3
    expected = [
        *([0, 0, 1 / 6, 1 / 6, 1 / 6], [0, 0, -third], [0, 0, -third / 2, -third / 2]),
        *([0, 1 / 2], [0, *[-third / 4] * 4]),
    ]
    assert made.num_sequences == len(expected)
    for (start, end), weights in zip(made.spans, expected, strict=True):
        np.testing.assert_allclose(made.weights[start:end], weights)
    assert made.weights.sum() == pytest.approx(0, abs=1e-15)
    assert (made.tokens.dtype, made.spans.dtype, made.weights.dtype) == (np.int32, np.int64, np.float64)


def test_the_order_of_items_changes_no_weight():
    items = [item(2, 3, 1, 2), item(1, 1, 4), item(5, 2, 2, 2, 2)]
    forward, backward = margin(items), margin(items[::-1])

    def weights(made):
        return sorted(made.weights[start:end].tolist() for start, end in made.spans)

    assert weights(forward) == weights(backward)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (item(2, 3), "item 1 has no wrong answer"),
        (item(2, 0, 1), "sequence 2 has 2 tokens"),
        (item(2, 1, 0), "sequence 3 has 2 tokens"),
        (item(0, 1, 2), "no prompt"),
    ],
)
def test_an_item_that_compares_nothing_is_refused(broken, message):
    with pytest.raises(InputError, match=message):
        margin([item(1, 1, 1), broken])


# ---- groups ----


def test_candidates_of_an_item_are_one_group_and_sequences_are_one_each():
    assert margin([item(2, 3, 1, 2), item(1, 1, 4)]).groups.tolist() == [0, 0, 0, 1, 1]
    assert margin([item(2, 3, 1, 2), item(1, 1, 4)]).num_groups == 2
    assert perplexity(sequences(5, 2, 9)).groups.tolist() == [0, 1, 2]
    assert perplexity([]).num_groups == 0


@pytest.mark.parametrize(("max_tokens", "kept"), [(1, 1), (12, 1), (13, 2), (19, 2), (20, 3), (99, 3)])
def test_leading_groups_are_whole_and_weigh_as_all(max_tokens: int, kept: int):
    items = [item(2, 3, 1), item(1, 1, 2), item(2, 1, 2)]  # of 8, 5 and 7 tokens
    found, whole = margin(items).leading(max_tokens), margin(items)
    assert found.num_groups == kept
    assert found.num_sequences == 2 * kept
    num_tokens = sum((8, 5, 7)[:kept])
    np.testing.assert_array_equal(found.tokens, whole.tokens[:num_tokens])
    np.testing.assert_array_equal(found.spans, whole.spans[: 2 * kept])
    np.testing.assert_allclose(found.weights, margin(items[:kept]).weights)
