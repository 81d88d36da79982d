"""Weighted cross-entropy of a language model's head, without ever holding the logits of all places.

The head is frozen while scoring, so the only gradient is that of the hidden states, and it follows from the softmax of
a place at once: logits are made for some places, turned into loss and gradient where they stand, and their memory is
used again for the next places. What is computed is what `torch.nn.functional.cross_entropy` of the whole computes.

Shape legend: P places that predict, D hidden, V vocabulary, N targets.
"""

from typing import Any

import torch
from torch import nn

from gisp_tasks.pruning.plan import LOGIT_BYTES

# Few enough that the allocator keeps the memory instead of giving it back each time.
_CPU_LOGIT_BYTES = 24 * 2**20


def weighted_cross_entropy(
    hidden_pd: torch.Tensor,
    head: nn.Linear,
    *,
    predictors: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Sum over targets of weight times cross-entropy (nats), differentiable by the hidden states alone.

    Args:
        hidden_pd: [P, D], in the head's dtype.
        head: to V logits, without a bias.
        predictors: int64 [N], which place predicts each target; never falls.
        targets: int64 [N], token ids.
        weights: float [N].

    Returns:
        A scalar, in the head's dtype or float32, whichever is wider.
    """
    assert head.bias is None, "the heads of all supported architectures have no bias"
    loss: torch.Tensor = _HeadLoss.apply(hidden_pd, head.weight, predictors, targets, weights)
    return loss


class _HeadLoss(torch.autograd.Function):
    """Loss and gradient together: the gradient is ready before the backward pass begins."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        predictors: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        wide = torch.promote_types(head.dtype, torch.float32)
        weights = weights.to(wide)
        rows = rows_at_once(head)
        buffer = head.new_empty(min(rows, len(hidden)), len(head))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        bounds = torch.searchsorted(
            predictors, torch.arange(0, len(hidden) + rows, rows, device=hidden.device)
        ).tolist()
        for number, first in enumerate(range(0, len(hidden), rows)):
            chosen = slice(first, first + rows)
            mine = slice(bounds[number], bounds[number + 1])
            some = hidden[chosen]
            logits = torch.mm(some, head.T, out=buffer[: len(some)]).to(wide)
            places, ids, share = predictors[mine] - first, targets[mine], weights[mine]
            logits.sub_(logits.amax(dim=1, keepdim=True))
            right = logits[places, ids]
            sums = logits.exp_().sum(dim=1)
            total += (share * (sums.log()[places] - right)).sum(dtype=torch.float64)
            if gradient is not None:
                by_place = torch.zeros_like(sums).index_add_(0, places, share)
                slope = logits.mul_((by_place / sums)[:, None])
                slope.index_put_((places, ids), -share, accumulate=True)
                torch.mm(slope.to(head.dtype), head, out=gradient[chosen])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def rows_at_once(head: torch.Tensor) -> int:
    """Places whose logits are held together.

    Args:
        head: weight [V, D].
    """
    wide = torch.promote_types(head.dtype, torch.float32)
    return max(1, (_CPU_LOGIT_BYTES if head.device.type == "cpu" else LOGIT_BYTES) // (len(head) * wide.itemsize))
