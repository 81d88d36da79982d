"""Query heads as structures: scores, what is counted, and the checkpoint, against masked models and naive recounts."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from subnetworks import Level, masked, random_heads, write_level
from torch.nn import functional

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.export.reload import prove_reload
from gisp_tasks.pruning import importance, objectives
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings
from gisp_tasks.pruning.layout import DEAD, layer_layout
from gisp_tasks.pruning.ranking import Limits, keep_sets, next_removals, smallest_model
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, KeepSets, Removals, parameters_along
from gisp_tasks.pruning.surgery import slice_model
from gisp_tasks.tasks.materialize import materialize_from_order

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
LENGTHS = [13, 8, 13, 3]


# ---- what is counted ----


def make_geometry(layers: int, groups: int, queries: int, width: int, *, bias: bool) -> Geometry:
    config = {
        "model_type": "llama",
        "hidden_size": 12,
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "head_dim": 4,
        "num_hidden_layers": layers,
        "intermediate_size": width,
        "vocab_size": 20,
        "attention_bias": bias,
    }
    return geometry_of(config, granularity="head")


def naive_layer(geometry: Geometry, heads_left: list[int]) -> tuple[int, int, int]:
    """(parameters, key/value heads, query heads) of the cheapest of all ways to write a layer's heads."""
    ways = []
    queries = geometry.num_query_heads // geometry.num_kv_groups
    for each in range(1, queries + 1):
        copies = 0
        for group in range(geometry.num_kv_groups):
            left = sum(1 for head in heads_left if head // queries == group)
            while left > 0:
                copies, left = copies + 1, left - each
        if copies == 0:
            copies = 1
        rows = [copies * each * geometry.head_dim] * 2 + [copies * geometry.head_dim] * 2
        count = sum(rows) * geometry.hidden_size + (sum(rows[1:]) if geometry.qkv_bias else 0)
        ways.append((count, copies, copies * each))
    return min(ways)


def naive_parameters(geometry: Geometry, gone: list[tuple[int, int, int]], multiple: int) -> int:
    """Every layer recounted after the removals ``gone``."""
    total = geometry.num_layers * geometry.layer_overhead
    for layer in range(geometry.num_layers):
        dead = {index for kind, at, index in gone if (kind, at) == (0, layer)}
        total += naive_layer(geometry, [h for h in range(geometry.num_query_heads) if h not in dead])[0]
        channels = geometry.intermediate_size - sum(1 for kind, at, _ in gone if (kind, at) == (1, layer))
        while channels < 1 or (channels % multiple and channels < geometry.intermediate_size):
            channels += 1
        total += channels * 3 * geometry.hidden_size
    return total


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    queries = draw(st.integers(1, 5))
    return make_geometry(
        draw(st.integers(1, 2)), draw(st.integers(1, 4)), queries, draw(st.integers(1, 9)), bias=draw(st.booleans())
    )


@FEW
@given(geometries(), st.integers(0, 2**16))
def test_conversion_is_the_cheapest_and_fewer_heads_never_cost_more(geometry: Geometry, seed: int):
    gone_first = np.random.default_rng(seed).permutation(geometry.num_query_heads)
    alive = np.ones(geometry.num_query_heads, dtype=np.bool_)
    costs = []
    for head in [None, *gone_first]:
        if head is not None:
            alive[head] = False
        heads_left = np.flatnonzero(alive).tolist()
        expected, _, _ = naive_layer(geometry, heads_left)
        keep = KeepSets.everything(geometry)
        keep.attention[0] = alive
        costs.append(geometry.decoder_parameters - geometry.parameters_of(keep))
        assert geometry.num_kv_groups * geometry.kv_group_parameters - costs[-1] == expected
        layout = layer_layout(geometry, keep, 0)
        each = len(layout.query_heads) // len(layout.kv_heads)
        rows = 2 * len(layout.query_heads) + 2 * len(layout.kv_heads)
        bias = len(layout.query_heads) + 2 * len(layout.kv_heads) if geometry.qkv_bias else 0
        assert (rows * geometry.hidden_size + bias) * geometry.head_dim == expected
        assert each * len(layout.kv_heads) == len(layout.query_heads) > 0, "runtimes divide one by the other"
        # Every head that is left has one place, below its own key/value head.
        assert sorted(layout.query_heads[layout.query_heads != DEAD].tolist()) == heads_left
        owner = np.repeat(layout.kv_heads, each)
        placed = layout.query_heads != DEAD
        assert (layout.query_heads[placed] // geometry.queries_per_group == owner[placed]).all()
    assert costs[0] == 0
    assert (np.diff(costs) >= 0).all()


@FEW
@given(geometries(), st.integers(0, 2**16), st.sampled_from([1, 4, 32]))
def test_parameters_along_an_order_equal_recounting_every_prefix(geometry: Geometry, seed: int, multiple: int):
    everything = [(0, layer, h) for layer in range(geometry.num_layers) for h in range(geometry.num_query_heads)]
    everything += [(1, layer, c) for layer in range(geometry.num_layers) for c in range(geometry.intermediate_size)]
    gone = [everything[i] for i in np.random.default_rng(seed).permutation(len(everything))]
    removals = Removals(*(np.array(column) for column in zip(*gone, strict=True)))
    expected = [naive_parameters(geometry, gone[:n], multiple) for n in range(len(gone) + 1)]
    found = parameters_along(geometry, removals, multiple)
    assert found.tolist() == expected
    assert (np.diff(found) <= 0).all()
    order = RemovalOrder.empty().extend(removals, 1)
    last = None
    for sparsity in np.linspace(0, 1 - expected[-1] / expected[0], 7)[:-1]:
        length = next(n for n, count in enumerate(expected) if count <= expected[0] * (1 - sparsity) + 1e-6)
        keep = order.level(sparsity, geometry=geometry, width_multiple=multiple)
        assert geometry.parameters_of(keep) == expected[length]
        np.testing.assert_array_equal(keep.attention, keep_sets(geometry, removals.prefix(length)).attention)
        assert last is None or last.contains(keep)
        last = keep


def naive_removals(
    scores: StructureScores, geometry: Geometry, limits: Limits, sparsity: float
) -> list[tuple[int, int, int]] | None:
    """Pop the lowest structure that no minimum keeps, one by one, until the written model is small enough."""
    budget = naive_parameters(geometry, [], 1) * (1 - sparsity) + 1e-6
    queries = geometry.num_query_heads // geometry.num_kv_groups
    tables = (scores.attention, scores.mlp)
    allowed = []
    for layer in np.flatnonzero(~limits.protected).tolist():
        best = {}
        for head in range(geometry.num_query_heads):
            best[head // queries] = max(best.get(head // queries, (-1.0, -1)), (float(tables[0][layer, head]), head))
        kept = {head for _, head in sorted(best.values(), reverse=True)[: limits.min_kv_groups]}
        allowed += [(tables[0][layer, h], 0, layer, h) for h in range(geometry.num_query_heads) if h not in kept]
        channels = sorted((tables[1][layer, c], 1, layer, c) for c in range(geometry.intermediate_size))
        allowed += channels[: max(0, len(channels) - limits.min_channels)]
    popped: list[tuple[int, int, int]] = []
    for entry in sorted(allowed):
        if naive_parameters(geometry, popped, limits.width_multiple) <= budget:
            return popped
        popped.append(entry[1:])
    return popped if naive_parameters(geometry, popped, limits.width_multiple) <= budget else None


@FEW
@given(geometries(), st.integers(0, 2**16), st.floats(0.05, 0.9), st.integers(1, 2))
def test_removals_equal_a_naive_loop_and_every_layer_keeps_its_groups(geometry, seed, sparsity, min_groups):
    generator = np.random.default_rng(seed)
    protected = generator.random(geometry.num_layers) < 0.3
    protected[0] = False
    limits = Limits(protected, min_groups, 2, 4)
    draw = generator.standard_exponential if seed % 2 else lambda shape: generator.integers(0, 3, shape)
    scores = StructureScores(
        draw((geometry.num_layers, geometry.num_query_heads)).astype(np.float32),
        draw((geometry.num_layers, geometry.intermediate_size)).astype(np.float32),
    )
    expected = naive_removals(scores, geometry, limits, sparsity)
    if expected is None:
        assert smallest_model(geometry, limits) > geometry.max_parameters(sparsity)
        with pytest.raises(InputError, match="lower the last level"):
            next_removals(scores, RemovalOrder.empty().removals, geometry, limits, sparsity)
        return
    assert smallest_model(geometry, limits) <= geometry.max_parameters(sparsity)
    found = next_removals(scores, RemovalOrder.empty().removals, geometry, limits, sparsity)
    assert list(zip(found.kinds.tolist(), found.layers.tolist(), found.indices.tolist(), strict=True)) == expected
    groups = (geometry.query_heads_left(keep_sets(geometry, found).attention) > 0).sum(axis=1)
    assert (groups >= min(min_groups, geometry.num_kv_groups)).all()


def test_without_shared_key_value_heads_the_granularities_are_one():
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    config |= {"num_hidden_layers": 2, "intermediate_size": 6, "vocab_size": 9}
    head, group = geometry_of(config, granularity="head"), geometry_of(config)
    for name in ("separate_heads", "num_attention_structures", "attention_elements", "queries_per_structure"):
        assert getattr(head, name) == getattr(group, name)
    shared = geometry_of({**config, "num_key_value_heads": 2}, granularity="head")
    assert (shared.num_attention_structures, shared.attention_elements) == (4, 2 * 2 * 8)


# ---- scores ----


def sequence_loss(network: torch.nn.Module, sequence: np.ndarray) -> torch.Tensor:
    ids = torch.from_numpy(sequence.astype(np.int64))[None]
    return functional.cross_entropy(network(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:])


def sliced(model, keep: KeepSets) -> torch.nn.Module:
    geometry = geometry_of(model.config, granularity="head")
    network = model.load(torch.float64)
    half = KeepSets(keep.attention | (np.arange(keep.attention.shape[1]) % 2 == 0), keep.mlp)
    slice_model(network, geometry, now=KeepSets.everything(geometry), wanted=half)
    slice_model(network, geometry, now=half, wanted=keep)
    return network


def scores_of(model, keep: KeepSets, sequences: list[np.ndarray], score: str) -> StructureScores:
    geometry = geometry_of(model.config, granularity="head")
    settings = ScoringSettings(np.zeros(geometry.num_layers, dtype=np.bool_), "elements", 3, score=score)
    calibration = objectives.perplexity(sequences)
    return importance.score(sliced(model, keep), keep, geometry, calibration, settings).scores


@pytest.fixture
def pruned(tiny) -> KeepSets:
    """A random subnetwork with one layer that has no attention left, and one without an MLP."""
    keep = random_heads(tiny.config)
    keep.attention[1], keep.mlp[2] = False, False
    return keep


def test_first_order_scores_equal_those_of_the_masked_dense_model(tiny, pruned, random_sequences, float64_norms):
    sequences = random_sequences(tiny.config["vocab_size"], LENGTHS)
    network = masked(tiny, pruned, torch.float64)
    (sum(sequence_loss(network, sequence) for sequence in sequences) / len(sequences)).backward()
    found = scores_of(tiny, pruned, sequences, "taylor")
    heads, head_dim = tiny.config["num_attention_heads"], tiny.config["head_dim"]
    shared = tiny.config["num_key_value_heads"] < heads
    for i, layer in enumerate(network.model.layers):
        products = {
            name: (getattr(layer.self_attn, f"{name}_proj").weight.detach()
                   * getattr(layer.self_attn, f"{name}_proj").weight.grad).abs()
            for name in "qkvo"
        }  # fmt: skip
        for head in np.flatnonzero(pruned.attention[i]).tolist():
            rows = slice(head * head_dim, (head + 1) * head_dim)
            parts = [products["q"][rows], products["o"][:, rows]]
            parts += [] if shared else [products["k"][rows], products["v"][rows]]
            expected = sum(float(part.sum()) for part in parts) / sum(part.numel() for part in parts)
            assert found.attention[i, head] == pytest.approx(expected, rel=1.2e-7)
    for found_table, kept in ((found.attention, pruned.attention), (found.mlp, pruned.mlp)):
        np.testing.assert_array_equal(np.isnan(found_table), ~kept)


def test_gate_fisher_scores_are_squared_derivatives_by_a_gate(tiny, pruned, random_sequences, float64_norms):
    sequences = random_sequences(tiny.config["vocab_size"], LENGTHS)
    network = masked(tiny, pruned, torch.float64).requires_grad_(False)
    head_dim, expected = tiny.config["head_dim"], np.zeros(pruned.attention.shape)
    gates = torch.ones((len(network.model.layers), tiny.config["num_attention_heads"]), dtype=torch.float64)
    gates.requires_grad_(True)
    for i, layer in enumerate(network.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, i=i: (inputs[0] * gates[i].repeat_interleave(head_dim),)
        )
    for sequence in sequences:
        (slope,) = torch.autograd.grad(sequence_loss(network, sequence), gates)
        expected += slope.numpy() ** 2 / len(sequences)
    shared = tiny.config["num_key_value_heads"] < tiny.config["num_attention_heads"]
    expected /= (2 if shared else 4) * head_dim * tiny.config["hidden_size"]
    found = scores_of(tiny, pruned, sequences, "gate_fisher").attention
    np.testing.assert_allclose(found[pruned.attention], expected[pruned.attention], rtol=2e-7)
    assert np.isnan(found[~pruned.attention]).all()


# ---- the checkpoint ----


@pytest.fixture(scope="session")
def written() -> dict[Path, Level]:
    """Levels written so far: most tests read the same one."""
    return {}


@pytest.fixture
def level(model, written: dict[Path, Level], tmp_path_factory) -> Level:
    """A random subnetwork of each model, with an empty attention and an empty MLP, written in float32."""
    if model.path not in written:
        keep = random_heads(model.config)
        keep.attention[1], keep.mlp[2] = False, False
        written[model.path] = write_level(model, keep, tmp_path_factory.mktemp("heads"), granularity="head")
    return written[model.path]


def test_parameters_on_disk_are_those_that_are_counted(level: Level):
    tensors = safetensors.torch.load_file(level.path / "model.safetensors")
    count = sum(tensor.numel() for tensor in tensors.values())
    assert count == level.written == level.geometry.parameters_of(level.keep) + level.geometry.other_parameters
    assert count == sum(parameter.numel() for parameter in level.load().parameters())
    per_layer = json.loads((level.path / "config.json").read_text())["per_layer_config"]
    for i, heads in enumerate(level.keep.attention):
        queries = level.geometry.queries_per_structure
        alive = [h * queries + q for h in np.flatnonzero(heads) for q in range(queries)]
        _, kv_heads, query_heads = naive_layer(level.geometry, alive)
        assert per_layer[str(i)]["num_key_value_heads"] * level.geometry.head_dim == len(
            tensors[f"model.layers.{i}.self_attn.k_proj.weight"]
        )
        assert (per_layer[str(i)]["num_key_value_heads"], per_layer[str(i)]["num_attention_heads"]) == (
            kv_heads,
            query_heads,
        )
    assert per_layer["1"]["num_attention_heads"] == per_layer["1"]["num_key_value_heads"] == 1
    assert per_layer["2"]["intermediate_size"] == 8


def test_every_head_on_disk_is_one_of_the_base_model_or_zero(level: Level):
    found = safetensors.torch.load_file(level.path / "model.safetensors")
    base = safetensors.torch.load_file(level.base.path / "model.safetensors")
    head_dim, group = level.geometry.head_dim, level.geometry.queries_per_group
    for i, heads in enumerate(level.keep.attention):
        stem = f"model.layers.{i}.self_attn."
        alive = set(np.flatnonzero(np.repeat(heads, level.geometry.queries_per_structure)).tolist())
        q, o = found[stem + "q_proj.weight"].split(head_dim), found[stem + "o_proj.weight"].split(head_dim, dim=1)
        k, v = (found[stem + f"{name}_proj.weight"].split(head_dim) for name in "kv")
        dense_q = base[stem + "q_proj.weight"].split(head_dim)
        dense_o = base[stem + "o_proj.weight"].split(head_dim, dim=1)
        dense_k, dense_v = (base[stem + f"{name}_proj.weight"].split(head_dim) for name in "kv")
        for place, (rows, columns) in enumerate(zip(q, o, strict=True)):
            if not columns.any():
                assert not rows.any()
                continue
            (head,) = (h for h in alive if torch.equal(dense_o[h], columns) and torch.equal(dense_q[h], rows))
            alive.discard(head)
            kv_place = place // (len(q) // len(k))
            assert torch.equal(k[kv_place], dense_k[head // group])
            assert torch.equal(v[kv_place], dense_v[head // group])
        assert not alive, "every head that was kept has its place"


def test_the_proof_allows_rearranged_heads_more_and_wrong_ones_nothing(level: Level):
    prompt = [int(token) for token in np.random.default_rng(1).integers(3, level.base.config["vocab_size"], 12)]
    arguments = {"geometry": level.geometry, "prompt": prompt, "greedy_tokens": 2}
    proof = prove_reload(level.base.path, level.path, keep=level.keep, **arguments)
    assert proof.tolerance == (1e-3 if level.geometry.separate_heads else 2e-4)
    other = KeepSets(np.roll(level.keep.attention, 1, axis=1), level.keep.mlp, level.keep.dead_width)
    if (other.attention != level.keep.attention).any():
        with pytest.raises(NumericsError, match="not the masked base model"):
            prove_reload(level.base.path, level.path, keep=other, **arguments)


def test_a_level_is_cut_from_the_file_of_an_order(stories, tmp_path: Path):
    geometry = geometry_of(stories.config, granularity="head")
    scores = StructureScores(
        np.random.default_rng(0).random((5, 8), dtype=np.float32) * 0.6,
        np.random.default_rng(1).random((5, 172), dtype=np.float32),
    )
    limits = Limits(np.array([False] * 4 + [True]), 1, 32, 32)
    removals = next_removals(scores, RemovalOrder.empty().removals, geometry, limits, 0.45)
    order = RemovalOrder.empty().extend(removals, 1)
    facts = {"geometry": json.dumps(geometry.__dict__), "granularity": "head", "base_source": "stories260K"}
    order.save(tmp_path / "order", geometry, facts)
    for sparsity in (0.2, 0.4):
        out = tmp_path / f"{sparsity}"
        found = materialize_from_order(
            str(stories.path), str(tmp_path / "order"), out=str(out), sparsity=sparsity, width_multiple=32, dtype=None
        )
        keep = order.level(sparsity, geometry=geometry, width_multiple=32)
        assert found == geometry.parameters_of(keep) + geometry.other_parameters
        assert geometry.sparsity_of(keep) >= sparsity
        prove_reload(stories.path, out, geometry=geometry, keep=keep, prompt=list(range(3, 30)), greedy_tokens=4)
    assert not keep.attention.all()
