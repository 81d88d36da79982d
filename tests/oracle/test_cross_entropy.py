"""The loss of the head in pieces against torch's own of the whole."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from gisp_tasks.pruning import cross_entropy
from gisp_tasks.pruning.cross_entropy import rows_at_once, weighted_cross_entropy

PLACES, HIDDEN, VOCABULARY = 13, 8, 37


def _data(dtype: torch.dtype) -> tuple[torch.Tensor, nn.Linear, dict[str, torch.Tensor]]:
    """Places without a target, with one and with several; weights of both signs, one of them zero."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PLACES, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    head.weight.data = 3 * torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    predictors = torch.tensor([0, 1, 1, 1, 3, 4, 4, 7, 8, 11, 12, 12])
    targets = torch.randint(VOCABULARY, (len(predictors),), generator=generator)
    targets[2] = targets[1]
    weights = torch.randn(len(predictors), generator=generator, dtype=torch.float64)
    weights[5] = 0
    return hidden, head.to(dtype), {"predictors": predictors, "targets": targets, "weights": weights}


def _whole(hidden: torch.Tensor, head: nn.Linear, data: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = head(hidden)[data["predictors"]].double()
    return (functional.cross_entropy(logits, data["targets"], reduction="none") * data["weights"]).sum()


@pytest.mark.parametrize("rows", [1, 3, 5, PLACES, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden, head, data = _data(dtype)
    size = torch.promote_types(dtype, torch.float32).itemsize
    monkeypatch.setattr(cross_entropy, "_CPU_LOGIT_BYTES", rows * VOCABULARY * size)
    assert rows_at_once(head.weight) == rows
    results = []
    for loss_of in (_whole, lambda h, head, data: weighted_cross_entropy(h, head, **data)):
        leaf = hidden.clone().requires_grad_(True)
        loss = loss_of(leaf, head, data)
        (3 * loss).backward()
        results.append((loss.double(), leaf.grad.double()))
    (expected, expected_slope), (found, found_slope) = results
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (found_slope - expected_slope).abs().max() <= tolerance * expected_slope.abs().max()
    assert not found_slope[[2, 5, 6, 9, 10]].any()


def test_loss_without_gradients() -> None:
    hidden, head, data = _data(torch.float64)
    with torch.inference_mode():
        found = weighted_cross_entropy(hidden, head, **data)
    assert found.item() == pytest.approx(_whole(hidden, head, data).item(), rel=1e-12)
    assert not found.requires_grad


def test_large_logits_stay_finite() -> None:
    hidden, head, data = _data(torch.float32)
    leaf = (1e4 * hidden).requires_grad_(True)
    loss = weighted_cross_entropy(leaf, head, **data)
    loss.backward()
    assert loss.item() == pytest.approx(_whole(1e4 * hidden, head, data).item(), rel=1e-5)
    assert torch.isfinite(leaf.grad).all()
