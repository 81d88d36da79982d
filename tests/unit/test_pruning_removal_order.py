"""The files of scores and of removal orders: what they hold, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, Removals

GEOMETRY = Geometry(
    family="llama",
    num_layers=2,
    hidden_size=12,
    num_query_heads=4,
    num_kv_groups=2,
    head_dim=4,
    intermediate_size=5,
    vocab_size=50,
    max_positions=64,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    norm_parameters=24,
    other_parameters=612,
)
METADATA = {"geometry": "{}", "granularity": "kv_group", "base_revision": "abc", "run_id": "0123456789ab"}


def removals(*structures: tuple[int, int, int]) -> Removals:
    return Removals(*(np.array(column, dtype=np.int64) for column in zip(*structures, strict=True)))


def sample_order() -> RemovalOrder:
    first = RemovalOrder.empty().extend(removals((1, 0, 3), (0, 1, 0), (1, 1, 4)), 1)
    return first.extend(removals((1, 0, 0), (1, 1, 2)), 3)  # a step that removes nothing leaves a gap


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "removal_order.safetensors"
    sample_order().save(path, GEOMETRY, METADATA)
    return path


def test_the_file_holds_step_and_rank_by_structure(saved: Path):
    tensors = load_file(saved)
    assert {name: tensor.dtype.name for name, tensor in tensors.items()} == {
        "attention.step": "int16",
        "attention.rank": "int32",
        "mlp.step": "int16",
        "mlp.rank": "int32",
    }
    assert tensors["attention.rank"].tolist() == [[-1, -1], [1, -1]]
    assert tensors["attention.step"].tolist() == [[-1, -1], [1, -1]]
    assert tensors["mlp.rank"].tolist() == [[3, -1, -1, 0, -1], [-1, -1, 4, -1, 2]]
    assert tensors["mlp.step"].tolist() == [[3, -1, -1, 1, -1], [-1, -1, 3, -1, 1]]


def test_an_order_survives_its_file(saved: Path):
    loaded, metadata = RemovalOrder.load(saved)
    assert metadata == METADATA
    expected = sample_order()
    for name in ("kinds", "layers", "indices"):
        assert getattr(loaded.removals, name).tolist() == getattr(expected.removals, name).tolist()
    assert loaded.steps.tolist() == [1, 1, 1, 3, 3]
    assert loaded.last_step == 3


def test_an_empty_order_survives_its_file(tmp_path: Path):
    RemovalOrder.empty().save(tmp_path / "order", GEOMETRY, METADATA)
    loaded, _ = RemovalOrder.load(tmp_path / "order")
    assert len(loaded.removals) == 0
    assert loaded.last_step == 0
    assert loaded.level(0.0, geometry=GEOMETRY, width_multiple=1).mlp.all()
    with pytest.raises(InputError, match="ends at 0 "):
        loaded.level(0.1, geometry=GEOMETRY, width_multiple=1)


def test_equal_orders_give_equal_bytes(saved: Path, tmp_path: Path):
    for attempt in range(5):  # safetensors orders several metadata entries at random
        path = tmp_path / f"again{attempt}"
        sample_order().save(path, GEOMETRY, dict(reversed(METADATA.items())))
        assert path.read_bytes() == saved.read_bytes()


def test_keep_sets_are_all_but_the_removed(saved: Path):
    keep = RemovalOrder.load(saved)[0].keep_sets(GEOMETRY)
    assert keep.attention.tolist() == [[True, True], [False, True]]
    assert keep.mlp.tolist() == [[False, True, True, False, True], [True, True, False, True, False]]


def test_a_width_multiple_gives_back_what_went_last():
    order = RemovalOrder.empty().extend(removals((1, 0, 3), (1, 0, 0), (1, 0, 1), (0, 1, 0)), 1)
    exact = order.level(0.2, geometry=GEOMETRY, width_multiple=1)
    assert exact.mlp[0].tolist() == [False, False, True, False, True]
    rounded = order.level(0.2, geometry=GEOMETRY, width_multiple=4)
    assert rounded.mlp[0].tolist() == [True, True, True, False, True], "channel 3 went first"
    coarse = order.level(0.18, geometry=GEOMETRY, width_multiple=32)
    assert coarse.mlp.all(), "5 channels cannot be rounded up to 32: the layer stays dense"


def _changed(path: Path, name: str, where: tuple[int, int], value: int) -> None:
    tensors = load_file(path)
    tensors[name][where] = value
    save_file(tensors, path, metadata={"gisp": json.dumps(METADATA)})


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("mlp.rank", (0, 0), 2),  # a rank twice
        ("mlp.rank", (1, 2), 9),  # a gap
        ("mlp.rank", (0, 1), 5),  # a rank without a step
        ("mlp.rank", (0, 0), -1),  # a step without a rank
        ("mlp.step", (0, 3), 4),  # steps fall
        ("mlp.step", (0, 3), 0),  # steps count from 1
        ("attention.step", (1, 0), -1),
        ("attention.step", (0, 0), 2),
    ],
)
def test_a_tampered_order_is_refused(saved: Path, name: str, where: tuple[int, int], value: int):
    _changed(saved, name, where, value)
    with pytest.raises(IntegrityError, match="is no removal order"):
        RemovalOrder.load(saved)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _without_a_table(path: Path) -> None:
    tensors = load_file(path)
    del tensors["mlp.step"]
    save_file(tensors, path, metadata={"gisp": json.dumps(METADATA)})


def _without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def _with_other_metadata(path: Path) -> None:
    save_file(load_file(path), path, metadata={"format": "pt"})


def _with_broken_metadata(path: Path) -> None:
    save_file(load_file(path), path, metadata={"gisp": "{"})


def _of_other_shapes(path: Path) -> None:
    tensors = load_file(path)
    tensors["mlp.step"] = tensors["mlp.step"][:, :4].copy()
    save_file(tensors, path, metadata={"gisp": json.dumps(METADATA)})


def _another_file(path: Path) -> None:
    path.write_text("not a safetensors file")


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _without_a_table,
        _without_metadata,
        _with_other_metadata,
        _with_broken_metadata,
        _of_other_shapes,
        _another_file,
    ],
)
def test_a_damaged_file_is_refused(saved: Path, damage):
    damage(saved)
    with pytest.raises(IntegrityError, match="is no removal order"):
        RemovalOrder.load(saved)


def test_scores_survive_their_file(tmp_path: Path):
    scores = StructureScores(
        np.array([[1.5, np.nan], [np.inf, np.inf]], np.float32), np.arange(10, dtype=np.float32).reshape(2, 5)
    )
    facts = {"step": 1, "objective": 2.25, "normaliser": "elements", "run_id": "0123456789ab"}
    scores.save(tmp_path / "one", facts)
    scores.save(tmp_path / "two", dict(reversed(facts.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded, found = StructureScores.load(tmp_path / "one")
    assert found == facts
    assert loaded.attention.dtype == loaded.mlp.dtype == np.float32
    np.testing.assert_array_equal(loaded.attention, scores.attention)
    np.testing.assert_array_equal(loaded.mlp, scores.mlp)
