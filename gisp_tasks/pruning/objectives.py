"""Objectives as signed token weights.

Every objective of this package is a signed, weighted sum of token losses,

    objective = sum over tokens t of weight_t * NLL(token_t | tokens before it in its sequence),

so a calibration set carries its objective as one weight a token, and scoring needs to know nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    tokens: NDArray[np.int32]
    spans: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.spans)

    @property
    def num_targets(self) -> int:
        """Tokens whose loss counts."""
        return int(np.count_nonzero(self.weights))


def perplexity(sequences: Sequence[NDArray[np.int32]], prompt_lengths: Sequence[int] | None = None) -> CalibrationSet:
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
    ends = np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64)
    starts = ends - np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    weights = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.float64)
    for i, (start, end, prompt) in enumerate(zip(starts, ends, prompts, strict=True)):
        num_targets = int(end - start) - prompt
        if num_targets < 1:
            raise InputError(
                f"calibration sequence {i} has {end - start} tokens of which {prompt} are given, so nothing is "
                f"predicted; every sequence needs at least one token after its prompt"
            )
        weights[start + prompt : end] = 1.0 / (num_targets * len(sequences))
    tokens = np.concatenate(sequences).astype(np.int32) if len(sequences) else np.zeros(0, np.int32)
    return CalibrationSet(tokens, np.stack([starts, ends], axis=1), weights)
