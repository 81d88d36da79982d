"""Ranking and levels against naive loops that recount the written model from scratch after every removal."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.pruning.ranking import Limits, keep_sets, limits_of, next_removals, smallest_model
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, Kind, parameters_along
from gisp_tasks.recipe import ProtectSection

FEW = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

Structure = tuple[int, int, int]  # kind, layer, index


def make_geometry(layers: int, groups: int, width: int, *, queries: int = 2, bias: bool = False) -> Geometry:
    return Geometry(
        family="llama",
        num_layers=layers,
        hidden_size=12,
        num_query_heads=groups * queries,
        num_kv_groups=groups,
        head_dim=4,
        intermediate_size=width,
        vocab_size=50,
        max_positions=64,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_parameters=24,
        other_parameters=612,
    )


# ---- the naive counterpart ----


def naive_parameters(geometry: Geometry, gone: list[Structure], multiple: int) -> int:
    """Elements of every tensor of the decoder layers as they would be written, one shape after the other."""
    hidden, head_dim = geometry.hidden_size, geometry.head_dim
    count = 0
    for layer in range(geometry.num_layers):
        groups = geometry.num_kv_groups - sum(1 for kind, at, _ in gone if kind == 0 and at == layer)
        channels = geometry.intermediate_size - sum(1 for kind, at, _ in gone if kind == 1 and at == layer)
        while channels % multiple and channels < geometry.intermediate_size:
            channels += 1
        query_rows = groups * (geometry.num_query_heads // geometry.num_kv_groups) * head_dim
        shapes = [(query_rows, hidden), (groups * head_dim, hidden), (groups * head_dim, hidden), (hidden, query_rows)]
        shapes += [(channels, hidden), (channels, hidden), (hidden, channels), (hidden, 1), (hidden, 1)]
        if geometry.qkv_bias:
            shapes += [(query_rows, 1), (groups * head_dim, 1), (groups * head_dim, 1)]
        if geometry.output_bias:
            shapes += [(hidden, 1)]
        if geometry.mlp_bias:
            shapes += [(channels, 1), (channels, 1), (hidden, 1)]
        count += sum(rows * columns for rows, columns in shapes)
    return count


def naive_removals(
    scores: StructureScores, gone: list[Structure], geometry: Geometry, limits: Limits, sparsity: float
) -> list[Structure] | None:
    """Pop the lowest of all allowed structures, one by one, until the written model is small enough."""
    budget = naive_parameters(geometry, [], 1) * (1 - sparsity) + 1e-6
    alive = {
        (kind, layer, index): float(table[layer, index])
        for kind, table in ((0, scores.attention), (1, scores.mlp))
        for layer in range(geometry.num_layers)
        for index in range(table.shape[1])
        if (kind, layer, index) not in gone
    }
    minimum = {0: limits.min_kv_groups, 1: limits.min_channels}
    popped: list[Structure] = []
    while naive_parameters(geometry, gone + popped, limits.width_multiple) > budget:
        held: dict[tuple[int, int], int] = {}
        for kind, layer, _ in alive:
            held[kind, layer] = held.get((kind, layer), 0) + 1
        allowed = [
            (score, structure)
            for structure, score in alive.items()
            if not limits.protected[structure[1]] and held[structure[0], structure[1]] > minimum[structure[0]]
        ]
        if not allowed:
            return None
        structure = min(allowed)[1]
        popped.append(structure)
        del alive[structure]
    return popped


def as_list(removals) -> list[Structure]:
    return list(zip(removals.kinds.tolist(), removals.layers.tolist(), removals.indices.tolist(), strict=True))


# ---- random trajectories ----


@dataclass(frozen=True)
class Case:
    geometry: Geometry
    limits: Limits
    seed: int
    tied: bool
    sparsities: tuple[float, ...]

    def scores(self, step: int) -> StructureScores:
        generator = np.random.default_rng((self.seed, step))
        shapes = (
            (self.geometry.num_layers, self.geometry.num_kv_groups),
            (
                self.geometry.num_layers,
                self.geometry.intermediate_size,
            ),
        )
        draw = (lambda shape: generator.integers(0, 3, shape)) if self.tied else generator.standard_exponential
        return StructureScores(*(draw(shape).astype(np.float32) for shape in shapes))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layers = draw(st.integers(1, 3))
    multiple = draw(st.sampled_from([1, 8, 32]))
    width = draw(st.integers(2, 10 if multiple == 1 else 70))
    geometry = make_geometry(
        layers, draw(st.integers(1, 4)), width, queries=draw(st.integers(1, 3)), bias=draw(st.booleans())
    )
    protected = np.array(draw(st.lists(st.booleans(), min_size=layers, max_size=layers)))
    protected[draw(st.integers(0, layers - 1))] = False
    limits = Limits(protected, draw(st.integers(1, 2)), draw(st.integers(1, width + 2)), multiple)
    sparsities = draw(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=3))
    return Case(geometry, limits, draw(st.integers(0, 2**16)), draw(st.booleans()), tuple(sorted(sparsities)))


@FEW
@given(cases())
def test_removals_equal_the_naive_greedy_loop_step_by_step(case: Case):
    order = RemovalOrder.empty()
    for step, sparsity in enumerate(case.sparsities, 1):
        scores = case.scores(step)
        expected = naive_removals(scores, as_list(order.removals), case.geometry, case.limits, sparsity)
        if expected is None:
            assert smallest_model(case.geometry, case.limits) > case.geometry.max_parameters(sparsity)
            with pytest.raises(InputError, match="lower the last level"):
                next_removals(scores, order.removals, case.geometry, case.limits, sparsity)
            return
        found = next_removals(scores, order.removals, case.geometry, case.limits, sparsity)
        assert as_list(found) == expected
        order = order.extend(found, step)


def finished(case: Case) -> RemovalOrder:
    """The order of all steps of a case that can be reached."""
    order = RemovalOrder.empty()
    for step, sparsity in enumerate(case.sparsities, 1):
        if smallest_model(case.geometry, case.limits) > case.geometry.max_parameters(sparsity):
            break
        order = order.extend(
            next_removals(case.scores(step), order.removals, case.geometry, case.limits, sparsity), step
        )
    return order


@FEW
@given(cases())
def test_the_limits_reach_exactly_the_smallest_model(case: Case):
    smallest = smallest_model(case.geometry, case.limits)
    sparsity = 1 - smallest / case.geometry.decoder_parameters
    found = next_removals(case.scores(1), RemovalOrder.empty().removals, case.geometry, case.limits, sparsity)
    assert naive_parameters(case.geometry, as_list(found), case.limits.width_multiple) == smallest
    with pytest.raises(InputError):
        next_removals(
            case.scores(1),
            RemovalOrder.empty().removals,
            case.geometry,
            case.limits,
            sparsity + 2 / case.geometry.decoder_parameters,
        )


@FEW
@given(cases())
def test_parameters_along_equals_recounting_every_prefix(case: Case):
    order = finished(case)
    gone = as_list(order.removals)
    expected = [
        naive_parameters(case.geometry, gone[:length], case.limits.width_multiple) for length in range(len(gone) + 1)
    ]
    assert parameters_along(case.geometry, order.removals, case.limits.width_multiple).tolist() == expected


@FEW
@given(cases(), st.sampled_from([1, 8, 32]))
def test_a_level_is_the_shortest_prefix_filled_up_with_what_went_last(case: Case, multiple: int):
    geometry, order = case.geometry, finished(case)
    gone = as_list(order.removals)
    dense = naive_parameters(geometry, [], 1)
    end = 1 - naive_parameters(geometry, gone, multiple) / dense
    levels = []
    for sparsity in sorted({0.0, *(end * fraction for fraction in (0.2, 0.35, 0.5, 0.81, 1.0))}):
        length = next(
            n
            for n in range(len(gone) + 1)
            if naive_parameters(geometry, gone[:n], multiple) <= dense * (1 - sparsity) + 1e-6
        )
        expected_attention = np.ones((geometry.num_layers, geometry.num_kv_groups), dtype=bool)
        expected_mlp = np.ones((geometry.num_layers, geometry.intermediate_size), dtype=bool)
        for kind, layer, index in gone[:length]:
            (expected_attention if kind == 0 else expected_mlp)[layer, index] = False
        for layer in range(geometry.num_layers):
            cut = [index for kind, at, index in gone[:length] if kind == 1 and at == layer]
            while cut and (geometry.intermediate_size - len(cut)) % multiple:
                expected_mlp[layer, cut.pop()] = True
        found = order.level(sparsity, geometry=geometry, width_multiple=multiple)
        np.testing.assert_array_equal(found.attention, expected_attention)
        np.testing.assert_array_equal(found.mlp, expected_mlp)
        assert geometry.sparsity_of(found) >= sparsity - 1e-9
        levels.append(found)
    for smaller in range(len(levels)):
        for larger in range(smaller):
            assert levels[larger].contains(levels[smaller]), "levels are nested, every pair of them"
    with pytest.raises(InputError, match="this removal order ends at"):
        order.level(end + 2 / dense, geometry=geometry, width_multiple=multiple)


@FEW
@given(cases())
def test_widths_and_minima_of_levels(case: Case):
    geometry, limits, order = case.geometry, case.limits, finished(case)
    reached = 1 - parameters_along(geometry, order.removals, limits.width_multiple)[-1] / geometry.decoder_parameters
    keep = order.level(reached, geometry=geometry, width_multiple=limits.width_multiple)
    widths = keep.mlp.sum(axis=1)
    assert all(width % limits.width_multiple == 0 or width == geometry.intermediate_size for width in widths.tolist())
    assert (widths >= min(limits.min_channels, geometry.intermediate_size)).all()
    assert (keep.attention.sum(axis=1) >= min(limits.min_kv_groups, geometry.num_kv_groups)).all()
    assert keep.attention[limits.protected].all()
    assert keep.mlp[limits.protected].all()


# ---- single facts ----


def test_ties_go_by_kind_then_layer_then_index():
    geometry = make_geometry(2, 2, 3)
    same = StructureScores(np.ones((2, 2), np.float32), np.ones((2, 3), np.float32))
    limits = Limits(np.array([False, False]), 1, 1, 1)
    reach = 1 - smallest_model(geometry, limits) / geometry.decoder_parameters
    found = next_removals(same, RemovalOrder.empty().removals, geometry, limits, reach)
    assert as_list(found) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]


def test_a_target_that_is_met_already_removes_nothing():
    geometry = make_geometry(2, 2, 8)
    scores = StructureScores(np.ones((2, 2), np.float32), np.ones((2, 8), np.float32))
    limits = Limits(np.array([False, False]), 1, 1, 1)
    first = next_removals(scores, RemovalOrder.empty().removals, geometry, limits, 0.3)
    assert len(next_removals(scores, first, geometry, limits, 0.3)) == 0
    assert len(next_removals(scores, first, geometry, limits, 0.0)) == 0


def test_a_live_score_that_is_no_number_is_refused_and_a_dead_one_is_not_read():
    geometry = make_geometry(1, 2, 4)
    limits = Limits(np.array([False]), 1, 1, 1)
    scores = StructureScores(np.array([[1, 2]], np.float32), np.array([[0.1, 3, 4, 5]], np.float32))
    first = next_removals(scores, RemovalOrder.empty().removals, geometry, limits, 0.03)
    assert as_list(first) == [(Kind.MLP, 0, 0)]
    scores.mlp[0, 0] = np.nan
    assert as_list(next_removals(scores, first, geometry, limits, 0.2))[0] == (Kind.ATTENTION, 0, 0)
    scores.mlp[0, 2] = np.nan
    with pytest.raises(NumericsError, match="layer 0 has 1 MLP scores"):
        next_removals(scores, first, geometry, limits, 0.2)


def test_keep_sets_of_a_prefix_hold_all_but_the_prefix():
    geometry = make_geometry(2, 2, 4)
    scores = StructureScores(np.ones((2, 2), np.float32), np.arange(8, dtype=np.float32).reshape(2, 4) / 10)
    limits = Limits(np.array([False, False]), 1, 1, 1)
    removals = next_removals(scores, RemovalOrder.empty().removals, geometry, limits, 0.2)
    keep = keep_sets(geometry, removals)
    assert (~keep.attention).sum() + (~keep.mlp).sum() == len(removals)
    assert not any(
        (keep.attention if kind == 0 else keep.mlp)[layer, index] for kind, layer, index in as_list(removals)
    )


@pytest.mark.parametrize(
    ("first", "last", "layers", "expected"),
    [
        (0.1, 1, 30, [0, 1, 2, 29]),
        (0.1, 1, 32, [0, 1, 2, 31]),
        (0.1, 1, 40, [0, 1, 2, 3, 39]),
        (0.1, 1, 5, [4]),
        (2, 0.5, 6, [0, 1, 3, 4, 5]),
        (0, 0, 3, []),
        (0.29, 0, 100, list(range(29))),  # 0.29 * 100 is 28.999999999999996
    ],
)
def test_protected_layers_are_a_fraction_or_a_number(first, last, layers, expected):
    limits = limits_of(ProtectSection(first_layers=first, last_layers=last), 32, layers)
    assert np.flatnonzero(limits.protected).tolist() == expected


def test_protecting_every_layer_is_an_input_error():
    with pytest.raises(InputError, match="lower first_layers or last_layers"):
        limits_of(ProtectSection(first_layers=3, last_layers=2), 32, 5)
