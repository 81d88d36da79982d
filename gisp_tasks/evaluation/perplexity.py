"""Token perplexity: of a text in non-overlapping windows, and of solutions given their questions.

A loss is computed from float32 logits and summed in float64. No mask is passed to the model: attention is
causal, so padding to the right of a sequence cannot change what is predicted before it.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.pruning.rows import runs_of_like_length

logger = logging.getLogger(__name__)

_PAD_ID = 0
# Rows of logits that are widened to float32 at once: 0.5 GB for a vocabulary of 128k.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Token perplexity and what it was measured on.

    Args:
        ppl: exp of ``mean_nll``.
        mean_nll: mean over all targets of the negative log likelihood, in nats.
        num_targets: predicted tokens.
        num_windows: windows of a text, or sequences.
        window: tokens a window; None where each sequence is its own window.
    """

    ppl: float
    mean_nll: float
    num_targets: int
    num_windows: int
    window: int | None


def text_windows(model_max: int, windows: Sequence[int]) -> tuple[int, ...]:
    """The windows that a model can be measured with: none longer than its context, none twice."""
    return tuple(dict.fromkeys(min(window, model_max) for window in windows))


def token_perplexity(model: Any, token_ids: torch.Tensor, *, window: int, batch_tokens: int = 4096) -> PerplexityResult:
    """Perplexity of a text cut into windows that do not overlap; what is left after the last is not used.

    The first token of each window is given, so a window has ``window - 1`` targets.

    Args:
        model: a causal language model of transformers; it is put into evaluation mode.
        token_ids: int64 [N], on the CPU.
        window: tokens a window, at least 2.
        batch_tokens: tokens that go through the model at once (at least one window).

    Raises:
        InputError: the text is shorter than one window, or the window has no target.
        NumericsError: a loss is not finite.

    Source: the paper's evaluation of WikiText-2.
    """
    if window < 2:
        raise InputError(
            f"perplexity with window={window}: a window's first token is given, so no token of it is predicted. "
            f"A window has at least 2 tokens; choose a longer one"
        )
    num_windows = len(token_ids) // window
    if num_windows == 0:
        raise InputError(
            f"perplexity with window={window}: the text has {len(token_ids)} tokens, and at least one whole window "
            f"is needed. Evaluate on more text (limit_tokens) or choose a shorter window"
        )
    windows = token_ids[: num_windows * window].view(num_windows, window)
    batches = torch.split(windows, max(1, batch_tokens // window))
    nll = _total_nll(model, ((batch, torch.ones_like(batch, dtype=torch.bool)) for batch in batches))
    return _result(nll, num_targets=num_windows * (window - 1), num_windows=num_windows, window=window)


def solution_perplexity(
    model: Any, sequences: Sequence[Sequence[int]], *, prompt_lengths: Sequence[int], batch_tokens: int = 4096
) -> PerplexityResult:
    """Perplexity of solutions given their questions: the mean is over the tokens of all solutions.

    A sequence longer than the model's context is left out, with a warning; ``num_windows`` counts the others.

    Args:
        model: a causal language model of transformers; it is put into evaluation mode.
        sequences: S lists of token ids, each a question and its solution.
        prompt_lengths: S numbers of leading tokens that are given; the first token always is.
        batch_tokens: tokens that go through the model at once, padding included (at least one sequence).

    Raises:
        InputError: a sequence has no token after its question, or none fits into the model's context.
        NumericsError: a loss is not finite.
    """
    pairs = [(list(ids), max(1, prompt)) for ids, prompt in zip(sequences, prompt_lengths, strict=True)]
    for i, (ids, prompt) in enumerate(pairs):
        if prompt >= len(ids):
            raise InputError(
                f"perplexity of solutions: sequence {i} has {len(ids)} tokens of which {prompt} are its question. "
                f"At least one token must follow the question; remove or repair this item"
            )
    fitting = _fitting(pairs, model.config.max_position_embeddings)
    # Neighbours in length share a batch, so little of it is padding.
    runs = runs_of_like_length([len(ids) for ids, _ in fitting], batch_tokens)
    nll = _total_nll(model, (_padded([fitting[i] for i in run]) for run in runs))
    num_targets = sum(len(ids) - prompt for ids, prompt in fitting)
    return _result(nll, num_targets=num_targets, num_windows=len(fitting), window=None)


def _fitting(pairs: list[tuple[list[int], int]], context: int) -> list[tuple[list[int], int]]:
    fitting = [pair for pair in pairs if len(pair[0]) <= context]
    if not fitting:
        raise InputError(
            f"perplexity of solutions: none of {len(pairs)} sequences fits into the model's context of {context} "
            f"tokens. At least one must; use shorter items, or leave this evaluation out of the recipe"
        )
    if len(fitting) < len(pairs):
        logger.warning(
            "perplexity of solutions: %d of %d sequences are longer than the model's context of %d tokens and are "
            "left out",
            len(pairs) - len(fitting),
            len(pairs),
            context,
        )
    return fitting


def _padded(batch: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, T] token ids padded to the right, and bool [B, T], True where a token is a target."""
    width = max(len(ids) for ids, _ in batch)
    token_ids = torch.full((len(batch), width), _PAD_ID, dtype=torch.int64)
    is_target = torch.zeros((len(batch), width), dtype=torch.bool)
    for i, (ids, prompt) in enumerate(batch):
        token_ids[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        is_target[i, prompt : len(ids)] = True
    return token_ids, is_target


@torch.inference_mode()
def _total_nll(model: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Sum of the targets' losses in nats, of batches of (token ids [B, T], is target [B, T]).

    A sequence's first token has nothing before it, so it never counts.
    """
    model.eval()
    total = 0.0
    for token_ids, is_target in batches:
        logits = model(input_ids=token_ids.to(model.device), use_cache=False).logits
        for row_logits, row_ids, row_is_target in zip(logits, token_ids, is_target, strict=True):
            total += _row_nll(row_logits[:-1], row_ids[1:].to(logits.device), row_is_target[1:])
        if not math.isfinite(total):
            raise NumericsError(
                "perplexity: the loss is not finite. The model's weights or activations have left the range of "
                f"{logits.dtype}; check the checkpoint, or use model.dtype float32"
            )
    return total


def _row_nll(logits: torch.Tensor, targets: torch.Tensor, is_target: torch.Tensor) -> float:
    """Sum over one sequence's targets, from logits [T - 1, V]; widened piece by piece, to bound the memory."""
    total = 0.0
    pieces = zip(*(torch.split(part, _ROWS_AT_ONCE) for part in (logits, targets, is_target)), strict=True)
    for piece, ids, mask in pieces:
        nll = cross_entropy(piece.float(), ids, reduction="none").to("cpu", torch.float64)
        total += float(nll[mask].sum())
    return total


def _result(nll: float, *, num_targets: int, num_windows: int, window: int | None) -> PerplexityResult:
    mean_nll = nll / num_targets
    try:
        ppl = math.exp(mean_nll)
    except OverflowError:
        raise NumericsError(f"perplexity: exp of the mean loss, {mean_nll:.6g} nats, is not a finite number") from None
    return PerplexityResult(ppl=ppl, mean_nll=mean_nll, num_targets=num_targets, num_windows=num_windows, window=window)
