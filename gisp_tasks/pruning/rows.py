"""Calibration groups as rows of a micro-batch: what a group's sequences begin with stands in the row once.

A row is the longest prefix that the group's sequences share, then each sequence's rest::

    tokens     p0 p1 p2 | a3 a4 a5 | b3 b4        two sequences, p0 p1 p2 a3 a4 a5 and p0 p1 p2 b3 b4
    positions   0  1  2 |  3  4  5 |  3  4
    segments    0  0  0 |  1  1  1 |  2  2

A token may see what stands before it in the prefix and in its own rest, so every sequence is computed as if it stood
alone, and the prefix only once. Causal attention makes that exact: no token of the prefix depends on what follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.pruning.objectives import CalibrationSet


@dataclass(frozen=True)
class Row:
    """One group of sequences, laid out.

    Args:
        tokens: int64 [T], prefix and rests.
        positions: int64 [T], place of each token in its own sequence.
        segments: int64 [T], 0 for the prefix, i for the rest of the group's sequence i, from 1.
        predictors: int64 [n], the place in the row whose output predicts each target.
        targets: int64 [n], token ids that are predicted.
        weights: float64 [n], of the targets' losses, none 0.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    predictors: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float64]


def rows_of(calibration: CalibrationSet) -> list[Row]:
    """One row a group, in the order of the set."""
    firsts = np.flatnonzero(np.diff(calibration.groups, prepend=-1))
    ends = np.append(firsts[1:], calibration.num_sequences)
    return [_row(calibration, calibration.spans[a:b]) for a, b in zip(firsts, ends, strict=True)]


def micro_batches(rows: list[Row], max_tokens: int) -> list[list[Row]]:
    """Rows of like length together, longest first, so that a lack of memory shows at once.

    Args:
        rows: in any order; those of one length stay in it.
        max_tokens: that a micro-batch may hold, padding counted; a longer row stands alone.
    """
    return [[rows[i] for i in run] for run in runs_of_like_length([len(row.tokens) for row in rows], max_tokens)]


def runs_of_like_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, longest first, cut into runs of at most ``max_tokens`` tokens, padding counted.

    Sequences of one length stay in their order; one that is longer than ``max_tokens`` stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    runs = []
    while order:
        size = max(1, max_tokens // lengths[order[0]])
        runs.append(order[:size])
        order = order[size:]
    return runs


def _row(calibration: CalibrationSet, spans: NDArray[np.int64]) -> Row:
    sequences = [calibration.tokens[start:end] for start, end in spans]
    weights = [calibration.weights[start:end] for start, end in spans]
    # A target belongs to its own sequence, even where its token is the same in all of them.
    prompts = [int(np.flatnonzero(weight)[0]) for weight in weights]
    prefix = _common_length(sequences, min(prompts)) if len(sequences) > 1 else 0
    tokens, positions = [sequences[0][:prefix]], [np.arange(prefix)]
    segments = [np.zeros(prefix, dtype=np.int64)]
    predictors, start = [], prefix
    for number, (sequence, weight) in enumerate(zip(sequences, weights, strict=True), 1):
        tokens.append(sequence[prefix:])
        positions.append(np.arange(prefix, len(sequence)))
        segments.append(np.full(len(sequence) - prefix, number, dtype=np.int64))
        before = np.flatnonzero(weight) - 1
        # In the row a rest begins at `start`; what its first token is predicted from is the end of the prefix.
        predictors.append(np.where(before < prefix, before, before - prefix + start))
        start += len(sequence) - prefix
    return Row(
        tokens=np.concatenate(tokens).astype(np.int64),
        positions=np.concatenate(positions),
        segments=np.concatenate(segments),
        predictors=np.concatenate(predictors),
        targets=np.concatenate([s[w != 0] for s, w in zip(sequences, weights, strict=True)]).astype(np.int64),
        weights=np.concatenate([w[w != 0] for w in weights]),
    )


def _common_length(sequences: list[NDArray[np.int32]], at_most: int) -> int:
    """Leading tokens that all sequences share, at most so many."""
    leading = np.stack([sequence[:at_most] for sequence in sequences])
    differing = np.flatnonzero((leading != leading[0]).any(axis=0))
    return int(differing[0]) if len(differing) else at_most
