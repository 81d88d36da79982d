"""Objectives as signed token weights.

Every objective of this package is a signed, weighted sum of token losses,

    objective = sum over tokens t of weight_t * NLL(token_t | tokens before it in its sequence),

so a calibration set carries its objective as one weight a token, and scoring needs to know nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gisp_tasks.errors import InputError


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences laid end to end, with the weight of each token's loss.

    Args:
        tokens: int32 [N], token ids of all sequences.
        spans: int64 [S, 2], first and past-the-last position of each sequence in ``tokens``.
        weights: float64 [N], weight of the loss of predicting this token; 0 where it is no target (always at
            the first token of a sequence).
        groups: int64 [S], number of the group that each sequence belongs to, from 0, rising by 0 or 1: the
            candidates of an item are one group, a sequence that stands for itself is one of its own.
    """

    tokens: NDArray[np.int32]
    spans: NDArray[np.int64]
    weights: NDArray[np.float64]
    groups: NDArray[np.int64]

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.spans)

    @property
    def num_groups(self) -> int:
        """G: items, or sequences that stand for themselves."""
        return int(self.groups[-1]) + 1 if len(self.groups) else 0

    @property
    def num_targets(self) -> int:
        """Tokens whose loss counts."""
        return int(np.count_nonzero(self.weights))

    def leading(self, max_tokens: int) -> "CalibrationSet":
        """The first groups, as many as ``max_tokens`` tokens hold and at least one, weighted as if they were all."""
        last_of_group = np.flatnonzero(np.diff(self.groups, append=self.num_groups))
        num_groups = max(1, int((self.spans[last_of_group, 1] <= max_tokens).sum()))
        num_sequences = int(last_of_group[num_groups - 1]) + 1
        num_tokens = int(self.spans[num_sequences - 1, 1])
        return CalibrationSet(
            self.tokens[:num_tokens],
            self.spans[:num_sequences],
            self.weights[:num_tokens] * (self.num_groups / num_groups),
            self.groups[:num_sequences],
        )


@dataclass(frozen=True)
class Candidate:
    """One answer to a prompt.

    Args:
        tokens: int [T], prompt and answer.
        prompt_length: leading tokens that are given, not predicted; at least one.
    """

    tokens: NDArray[np.integer[Any]]
    prompt_length: int


@dataclass(frozen=True)
class Item:
    """One question: its correct answer and its wrong ones, at least one."""

    correct: Candidate
    wrong: tuple[Candidate, ...]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The correct one first."""
        return (self.correct, *self.wrong)


def margin(items: Sequence[Item]) -> CalibrationSet:
    """Mean NLL of the correct answers minus mean NLL of all wrong ones, each answer by its own token mean.

    A wrong candidate of an item with many of them weighs as much as that of an item with one (METHOD A2, B3). The
    weights sum to 0, and one backward pass over them gives the difference of the two mean gradients. Deviation from
    the reference code: an answer's weight does not depend on the batch it is scored in.

    Raises:
        InputError: a candidate has no prompt or no answer token, or an item has no wrong candidate.
    """
    num_wrong = sum(len(item.wrong) for item in items)
    candidates: list[Candidate] = []
    sharers: list[int] = []
    groups: list[int] = []
    for i, item in enumerate(items):
        if not item.wrong:
            raise InputError(f"calibration item {i} has no wrong answer; every item needs at least one")
        candidates += item.candidates
        sharers += [len(items)] + [-num_wrong] * len(item.wrong)
        groups += [i] * len(item.candidates)
    if any(candidate.prompt_length < 1 for candidate in candidates):
        raise InputError("a calibration candidate has no prompt; every prompt needs at least one token")
    return _weighted([c.tokens for c in candidates], [c.prompt_length for c in candidates], sharers, groups)


def perplexity(
    sequences: Sequence[NDArray[np.integer[Any]]], prompt_lengths: Sequence[int] | None = None
) -> CalibrationSet:
    """Mean over sequences of each one's mean token cross-entropy (METHOD B3; the paper's language-model loss).

    For sequences of one length this is the mean over all target tokens.

    Args:
        sequences: S arrays of token ids, each at least two long.
        prompt_lengths: leading tokens of each sequence that are given, not predicted; by default the first
            token only.

    Raises:
        InputError: a sequence has no target token.
    """
    prompts = [1] * len(sequences) if prompt_lengths is None else [max(1, length) for length in prompt_lengths]
    return _weighted(sequences, prompts, [len(sequences)] * len(sequences), range(len(sequences)))


def _weighted(
    sequences: Sequence[NDArray[np.integer[Any]]], prompts: Sequence[int], sharers: Sequence[int], groups: Sequence[int]
) -> CalibrationSet:
    """Lay sequences end to end; sequence i has weight 1 / sharers[i], which its targets share evenly."""
    ends = np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64)
    starts = ends - np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    weights = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.float64)
    for i, (start, end, prompt, number) in enumerate(zip(starts, ends, prompts, sharers, strict=True)):
        num_targets = int(end - start) - prompt
        if num_targets < 1:
            raise InputError(
                f"calibration sequence {i} has {end - start} tokens of which {prompt} are given, so nothing is "
                f"predicted; every sequence needs at least one token after its prompt"
            )
        weights[start + prompt : end] = 1.0 / (num_targets * number)
    tokens = np.concatenate(sequences).astype(np.int32) if len(sequences) else np.zeros(0, np.int32)
    return CalibrationSet(tokens, np.stack([starts, ends], axis=1), weights, np.array(groups, dtype=np.int64))
