"""Least squares against numpy's solver, Gram matrices against a plain forward pass, and a lower loss on unseen text."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gisp_tasks.errors import InputError
from gisp_tasks.pruning import compensation, objectives
from gisp_tasks.pruning.compensation import HELD_BACK_EVERY, RIDGES, Gram
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import objective_value
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.pruning.surgery import mask_model, slice_model


def _gram_of(inputs: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(inputs.T @ inputs)


def _least_squares(weight: np.ndarray, inputs: np.ndarray, kept: list[int], ridge: float) -> np.ndarray:
    """Weights of the kept inputs by numpy's solver: the ridge as further rows that pull the change to zero."""
    removed = [i for i in range(weight.shape[1]) if i not in kept]
    strength = np.sqrt(ridge * np.mean(np.sum(inputs[:, kept] ** 2, axis=0)))
    design = np.vstack([inputs[:, kept], strength * np.eye(len(kept))])
    wanted = np.vstack([inputs[:, removed] @ weight[:, removed].T, np.zeros((len(kept), weight.shape[0]))])
    change = np.linalg.lstsq(design, wanted, rcond=None)[0].T
    return weight[:, kept] + change


def _error(weight: np.ndarray, new: np.ndarray, inputs: np.ndarray, kept: list[int]) -> float:
    removed = [i for i in range(weight.shape[1]) if i not in kept]
    lost = inputs[:, removed] @ weight[:, removed].T
    left = inputs @ weight.T - inputs[:, kept] @ new.T
    return float((left**2).sum() / (lost**2).sum())


@pytest.mark.parametrize("seed", range(4))
def test_solution_is_the_ridge_regression_that_predicts_held_back_inputs_best(seed: int) -> None:
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(9, 9)) + 2 * generator.normal(size=(9, 1))
    fit, held_back = generator.normal(size=(40, 9)) @ mixing, generator.normal(size=(12, 9)) @ mixing
    weight, kept = generator.normal(size=(5, 9)), [0, 2, 3, 7]
    gram = Gram(_gram_of(fit), _gram_of(held_back))

    found = compensation.solve("w", torch.from_numpy(weight), gram, torch.tensor(kept))

    by_ridge = {r: _error(weight, _least_squares(weight, fit, kept, r), held_back, kept) for r in RIDGES}
    assert found.ridge == min(by_ridge, key=by_ridge.__getitem__)
    assert found.error == pytest.approx(by_ridge[found.ridge], rel=1e-6)
    expected = _least_squares(weight, np.vstack([fit, held_back]), kept, found.ridge)
    np.testing.assert_allclose(found.weight[:, kept].numpy(), expected, rtol=1e-8, atol=1e-10)
    removed = [i for i in range(9) if i not in kept]
    assert not found.weight[:, removed].any()


def test_inputs_that_say_nothing_leave_the_weights_as_they_were(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.arange(12.0).view(3, 4)
    nothing = torch.zeros(4, 4, dtype=torch.float64)

    found = compensation.solve("o.weight", weight, Gram(nothing, nothing), torch.tensor([0, 1]))

    assert found.ridge is None
    assert found.error == 1.0
    assert torch.equal(found.weight[:, :2], weight[:, :2])
    assert "o.weight: its kept inputs cannot stand in for the removed ones" in caplog.text


def test_fit_that_fails_on_held_back_inputs_is_not_used() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(3, 6))
    # Two samples for four kept inputs fit perfectly and mean nothing; the held-back ones are of another kind.
    fit = generator.normal(size=(2, 6))
    held_back = np.hstack([100 * generator.normal(size=(50, 4)), generator.normal(size=(50, 2))])
    gram = Gram(_gram_of(fit), _gram_of(held_back))

    found = compensation.solve("w", torch.from_numpy(weight), gram, torch.arange(4))

    assert found.ridge is None
    np.testing.assert_array_equal(found.weight[:, :4].numpy(), weight[:, :4])


def _hooked_inputs(model: Any, path: str, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """What one module is given in plain forward passes, one sequence at a time: [T, n] each."""
    found: list[np.ndarray] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, arguments: found.append(arguments[0][0].double().numpy())
    )
    with torch.inference_mode():
        for sequence in sequences:
            model(input_ids=torch.from_numpy(sequence.astype(np.int64))[None], use_cache=False)
    hook.remove()
    return found


def test_gram_matrices_are_those_of_a_plain_forward_pass(
    model: Any, random_sequences: Callable[..., list[np.ndarray]], random_keep: Callable[..., Any]
) -> None:
    geometry = geometry_of(model.config)
    sequences = random_sequences(geometry.vocab_size, [9, 4, 7, 7, 2, 9, 5, 3, 6, 8])
    keep = KeepSets.everything(geometry)
    keep.attention[-1, 0] = keep.mlp[-1, 0] = keep.mlp[0, 1] = False
    loaded = model.load()

    grams = {
        (layer, role): gram
        for layer, role, gram in compensation.layer_grams(
            loaded, geometry, objectives.perplexity(sequences), batch_tokens=20, keeps=[keep]
        )
    }

    last = geometry.num_layers - 1
    assert sorted(grams) == sorted({(0, "down"), (last, "down"), (last, "o")})
    for (layer, role), gram in grams.items():
        path = f"model.layers.{layer}." + {"o": "self_attn.o_proj", "down": "mlp.down_proj"}[role]
        inputs = _hooked_inputs(loaded, path, sequences)
        for total, wanted in ((gram.fit, False), (gram.held_back, True)):
            chosen = np.vstack([x for i, x in enumerate(inputs) if (i % HELD_BACK_EVERY == 1) is wanted])
            np.testing.assert_allclose(total.numpy(), chosen.T @ chosen, rtol=1e-4, atol=1e-5)


def _stories(testdata: Any, tokenizer: Any, split: str, number: int) -> list[np.ndarray]:
    import pyarrow.parquet as pq

    texts = pq.read_table(testdata / f"data/tinystories/{split}.parquet")["text"].to_pylist()[:number]
    return [np.array(tokenizer(text)["input_ids"][:128], dtype=np.int32) for text in texts]


def test_loss_on_unseen_text_falls_and_slicing_keeps_it(stories: Any, testdata: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories.path)
    geometry = geometry_of(stories.config)
    generator = np.random.default_rng(0)
    keep = KeepSets.everything(geometry)
    keep.mlp[1:-1] = generator.random(keep.mlp[1:-1].shape) < 0.6
    keep.attention[2, 0] = False
    unseen = objectives.perplexity(_stories(testdata, tokenizer, "validation", 30))
    masked = stories.load()
    mask_model(masked, geometry, keep)
    before = objective_value(masked, unseen, 1024)

    fit = objectives.perplexity(_stories(testdata, tokenizer, "train", 60))
    solved = [c for _, c in compensation.compensate(stories.load(), geometry, [keep], fit, batch_tokens=1024)]
    compensated = stories.load()
    for part in solved:
        compensated.get_parameter(part.name).data.copy_(part.weight)
    after = objective_value(compensated, unseen, 1024)
    slice_model(compensated, geometry, now=KeepSets.everything(geometry), wanted=keep)

    dense = objective_value(stories.load(), unseen, 1024)
    assert dense < after < dense + 0.85 * (before - dense)
    assert objective_value(compensated, unseen, 1024) == pytest.approx(after, rel=1e-5)
    again = [c for _, c in compensation.compensate(stories.load(), geometry, [keep], fit, batch_tokens=1024)]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(solved, again, strict=True))


def test_several_subnetworks_at_once_are_solved_as_each_alone(
    stories: Any, random_sequences: Callable[..., list[np.ndarray]]
) -> None:
    geometry = geometry_of(stories.config)
    data = objectives.perplexity(random_sequences(geometry.vocab_size, [32] * 12))
    keeps = []
    for seed in (0, 1):
        keep = KeepSets.everything(geometry)
        keep.mlp[:] = np.random.default_rng(seed).random(keep.mlp.shape) < 0.7
        keeps.append(keep)
    model = stories.load()

    together: list[list[Any]] = [[], []]
    for index, part in compensation.compensate(model, geometry, keeps, data, batch_tokens=256):
        together[index].append(part)

    for keep, parts in zip(keeps, together, strict=True):
        alone = [part for _, part in compensation.compensate(model, geometry, [keep], data, batch_tokens=256)]
        assert [part.name for part in alone] == [part.name for part in parts]
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(alone, parts, strict=True))


def test_one_sequence_is_too_few(stories: Any, random_sequences: Callable[..., list[np.ndarray]]) -> None:
    geometry = geometry_of(stories.config)
    data = objectives.perplexity(random_sequences(geometry.vocab_size, [32]))
    with pytest.raises(InputError, match="at least two are needed"):
        list(compensation.compensate(stories.load(), geometry, [KeepSets.everything(geometry)], data, batch_tokens=64))
