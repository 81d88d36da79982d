"""Compatibility mode against the referee: the same structures after every step, not one different."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_referee as referee
import torch
import yaml
from safetensors.numpy import load_file

from gisp_tasks.errors import InputError
from gisp_tasks.pruning import importance, objectives
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.importance import ScoringSettings
from gisp_tasks.pruning.objectives import CalibrationSet, Candidate, Item
from gisp_tasks.pruning.plan import make_plan
from gisp_tasks.pruning.ranking import limits_of
from gisp_tasks.pruning.reference import structure_ratios, threshold_rank, threshold_removals
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.pruning.surgery import slice_model
from gisp_tasks.recipe import REFERENCE_PROTECT, ProtectSection, Recipe

# Below this, the order in which float32 sums run decides, not the method.
SAFE_GAP = 1e-5

# Eleven layers: the first and the last are skipped, so 0.7 of all structures can go.
DEEP = {"num_hidden_layers": 11, "intermediate_size": 24}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4},
    "mha-biases": {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gqa": {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
    "mqa-tied": {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2", "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3},
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}


@pytest.fixture(scope="module")
def deep(build_tiny) -> dict[str, Any]:
    return {name: build_tiny(**{"tie_word_embeddings": False, **DEEP, **sizes}) for name, sizes in SHAPES.items()}


def keep_sets_by_step(
    model: torch.nn.Module, config: dict, calibration: CalibrationSet, *, ratio: float, steps: int, micro_batch: int = 3
) -> list[KeepSets]:
    """What the package's steps leave: score, threshold, slice, and again."""
    geometry = geometry_of(config, granularity="head")
    limits = limits_of(ProtectSection(**REFERENCE_PROTECT), 32, geometry.num_layers)
    settings = ScoringSettings(limits.protected, "reference", micro_batch)
    order, held, found = RemovalOrder.empty(), KeepSets.everything(geometry), []
    for step, target in enumerate(structure_ratios(steps, ratio), 1):
        scores = importance.score(model, held, geometry, calibration, settings).scores
        removals = threshold_removals(scores, order.removals, geometry, limits.protected, target)
        order = order.extend(removals, step)
        keep = order.keep_sets(geometry)
        slice_model(model, geometry, now=held, wanted=keep)
        held = keep
        found.append(keep)
    return found


def assert_equal_steps(found: list[KeepSets], expected: list[referee.Iteration]) -> None:
    assert len(found) == len(expected)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
        np.testing.assert_array_equal(ours.attention, theirs.heads.numpy(), err_msg=f"heads, step {step}")
        np.testing.assert_array_equal(ours.mlp, theirs.channels.numpy(), err_msg=f"channels, step {step}")


def tokens_of(config: dict, sequences: int = 6, length: int = 14, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config["vocab_size"], (sequences, length))


# ---- perplexity ----


def referee_of_perplexity(
    model: torch.nn.Module, tokens: np.ndarray, *, ratio: float, steps: int, batch_size: int = 2
) -> list[referee.Iteration]:
    """What the referee leaves after each step, by the perplexity of ``tokens`` [S, T]."""

    def gradients(network: torch.nn.Module) -> Any:
        return referee.perplexity_gradients(network, tokens.tolist(), batch_size=batch_size)

    return list(referee.iterations(model, structure_ratio=ratio, num_iterations=steps, gradients=gradients))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ratio", "steps"), [(0.7, 5), (0.4, 1)])
def test_every_step_leaves_what_the_referee_leaves(deep, shape, ratio, steps, float64_norms):
    model, tokens = deep[shape], tokens_of(deep[shape].config)
    expected = referee_of_perplexity(model.load(torch.float64), tokens, ratio=ratio, steps=steps)
    found = keep_sets_by_step(
        model.load(torch.float64), model.config, objectives.perplexity(list(tokens)), ratio=ratio, steps=steps
    )
    assert_equal_steps(found, expected)
    removed = 1 - (found[-1].attention.sum() + found[-1].mlp.sum()) / (found[-1].attention.size + found[-1].mlp.size)
    assert ratio <= removed < ratio + 0.02
    if steps > 1:
        assert (~found[0].attention).sum() + (~found[0].mlp).sum() == 1, "the first value of the schedule is 0"


def test_sub_layers_without_any_structure_are_scored_and_pruned_on(deep, float64_norms):
    """Nothing keeps the reference from emptying a layer's attention, or its MLP."""
    emptied = {"attention": False, "mlp": False}
    for shape in ("mha", "gqa"):
        model, tokens = deep[shape], tokens_of(deep[shape].config)
        starved = [model.load(torch.float64) for _ in range(2)]
        for network in starved:
            with torch.no_grad():
                network.model.layers[4].self_attn.o_proj.weight.mul_(1e-9)
                network.model.layers[7].mlp.down_proj.weight.mul_(1e-9)
                network.model.layers[7].mlp.up_proj.weight.mul_(1e-9)
        expected = referee_of_perplexity(starved[0], tokens, ratio=0.6, steps=4, batch_size=3)
        calibration = objectives.perplexity(list(tokens))
        found = keep_sets_by_step(starved[1], model.config, calibration, ratio=0.6, steps=4)
        assert_equal_steps(found, expected)
        emptied["attention"] |= not found[1].attention.any(axis=1).all()
        emptied["mlp"] |= not found[1].mlp.any(axis=1).all()
    assert emptied == {"attention": True, "mlp": True}


def test_in_float32_on_a_trained_model(stories, testdata):
    tokens = story_tokens(stories, testdata)
    expected = referee_of_perplexity(stories.load(), tokens, ratio=0.7, steps=6)
    assert min(iteration.gap for iteration in expected) > SAFE_GAP, "another seed: float32 cannot decide on this data"
    calibration = objectives.perplexity(list(tokens))
    for micro_batch in (2, 12):
        found = keep_sets_by_step(
            stories.load(), stories.config, calibration, ratio=0.7, steps=6, micro_batch=micro_batch
        )
        assert_equal_steps(found, expected)


def story_tokens(stories, testdata: Path) -> np.ndarray:
    """[12, 48] token ids of TinyStories."""
    import pyarrow.parquet
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories.path)
    texts = pyarrow.parquet.read_table(testdata / "data/tinystories/validation.parquet")["text"].to_pylist()[:12]
    return np.array([tokenizer(text)["input_ids"][:48] for text in texts])


# ---- margin ----


def random_items(vocab: int, count: int, seed: int = 2) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)

    def draw(low: int, high: int) -> list[int]:
        return generator.integers(3, vocab, int(generator.integers(low, high))).tolist()

    return [
        {"prompt_ids": draw(2, 9), "correct_ids": draw(1, 5), "wrong_ids": [draw(1, 5) for _ in range(1 + i % 4)]}
        for i in range(count)
    ]


def margin_of(items: list[dict[str, Any]]) -> CalibrationSet:
    def candidate(item: dict[str, Any], answer: list[int]) -> Candidate:
        return Candidate(np.array(item["prompt_ids"] + answer), len(item["prompt_ids"]))

    return objectives.margin(
        [
            Item(candidate(item, item["correct_ids"]), tuple(candidate(item, wrong) for wrong in item["wrong_ids"]))
            for item in items
        ]
    )


@pytest.mark.parametrize("shape", ["mha", "gqa", "qwen3"])
def test_margin_leaves_what_the_referee_leaves(deep, shape, float64_norms):
    model = deep[shape]
    items = random_items(model.config["vocab_size"], 7)
    expected = list(
        referee.iterations(
            model.load(torch.float64),
            structure_ratio=0.65,
            num_iterations=4,
            gradients=lambda m: referee.margin_gradients(m, items),
        )
    )
    found = keep_sets_by_step(model.load(torch.float64), model.config, margin_of(items), ratio=0.65, steps=4)
    assert_equal_steps(found, expected)


# ---- ties, dead structures, truncation ----


@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_ties_and_dead_structures_go_together(deep, shape, float64_norms):
    model, tokens = deep[shape], tokens_of(deep[shape].config)
    networks = [model.load(torch.float64) for _ in range(2)]
    for network in networks:
        with torch.no_grad():
            for layer in network.model.layers[2:9]:
                mlp = layer.mlp
                for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                    weight[1:12] = weight[0].clone()
                mlp.down_proj.weight[:, 1:12] = mlp.down_proj.weight[:, :1].clone()
            network.model.layers[3].mlp.down_proj.weight[:, 20] = 0
            network.model.layers[3].mlp.up_proj.weight[20] = 0
            network.model.layers[6].self_attn.o_proj.weight[:, : model.config["head_dim"]] = 0
            network.model.layers[6].self_attn.q_proj.weight[: model.config["head_dim"]] = 0
            if shape == "mha":
                network.model.layers[6].self_attn.v_proj.weight[: model.config["head_dim"]] = 0
                network.model.layers[6].self_attn.k_proj.weight[: model.config["head_dim"]] = 0
    expected = referee_of_perplexity(networks[0], tokens, ratio=0.6, steps=5)
    calibration = objectives.perplexity(list(tokens))
    found = keep_sets_by_step(networks[1], model.config, calibration, ratio=0.6, steps=5)
    assert_equal_steps(found, expected)
    assert not found[0].attention[6, 0]
    assert not found[0].mlp[3, 20]
    assert (~found[0].attention).sum() + (~found[0].mlp).sum() == 2, "one was asked for, both dead ones tie at 0"
    duplicates = [keep.mlp[2:9, :12].sum(axis=1) for keep in found]
    assert any(((count != 0) & (count != 12)).sum() == 0 and (count == 0).any() for count in duplicates)


def test_selection_on_scores_full_of_ties():
    """Against a threshold by sorting, in plain Python; layers of few structures, so truncation has many cases."""
    generator = np.random.default_rng(4)
    for case in range(300):
        layers, heads, width = (int(n) for n in generator.integers([2, 1, 1], [12, 6, 9]))
        geometry = small_geometry(layers, heads, width)
        limits = limits_of(ProtectSection(**REFERENCE_PROTECT), 32, layers)
        ratio = float(np.float32(generator.random()))
        total = layers * (heads + width)
        if threshold_rank(total, ratio) > int((~limits.protected).sum()) * (heads + width):
            continue
        scores = StructureScores(
            generator.integers(0 if case % 2 else 1, 9, (layers, heads)).astype(np.float32),
            generator.integers(0 if case % 2 else 1, 9, (layers, width)).astype(np.float32),
        )
        for table in (scores.attention, scores.mlp):
            table[limits.protected] = np.inf
        removals = threshold_removals(scores, RemovalOrder.empty().removals, geometry, limits.protected, ratio)
        everything = [
            (float(table[layer, index]), kind, layer, index)
            for kind, table in enumerate((scores.attention, scores.mlp))
            for layer in range(layers)
            for index in range(table.shape[1])
        ]
        rank = total - int(total * (1 - torch.tensor(ratio))) + 1
        threshold = sorted(everything)[rank - 1][0]
        expected = sorted(entry for entry in everything if entry[0] <= threshold)
        found = zip(removals.kinds.tolist(), removals.layers.tolist(), removals.indices.tolist(), strict=True)
        assert list(found) == [entry[1:] for entry in expected]


def small_geometry(layers: int, heads: int, width: int) -> Geometry:
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 2,
        "num_hidden_layers": layers,
        "intermediate_size": width,
        "vocab_size": 11,
    }
    return geometry_of(config, granularity="head")


def test_a_live_structure_that_scores_nothing_goes_although_the_step_is_full():
    geometry = small_geometry(3, 2, 6)
    protected = np.array([False, False, True])
    order = RemovalOrder.empty()
    ones = StructureScores(np.ones((3, 2), np.float32), np.ones((3, 6), np.float32))
    ones.mlp[0, :4] = 0.5
    order = order.extend(threshold_removals(ones, order.removals, geometry, protected, 0.0), 1)
    assert len(order.removals) == 4, "one was asked for, four tie"
    ones.mlp[1, 5] = 0
    later = threshold_removals(ones, order.removals, geometry, protected, 0.0)
    assert (later.kinds.tolist(), later.layers.tolist(), later.indices.tolist()) == ([1], [1], [5])
    assert len(threshold_removals(ones, order.removals.then(later), geometry, protected, 0.0)) == 0


def test_lifting_by_the_minimum_rounds_as_in_float32():
    """Before anything is cut the scores are lifted; two that differ can be equal afterwards, and go together."""
    geometry = small_geometry(3, 1, 3)
    protected = np.array([False, False, True])
    scores = StructureScores(np.full((3, 1), 9, np.float32), np.full((3, 3), 9, np.float32))
    scores.mlp[0] = [2**-24, 1 - 2**-24, 1]
    # 12 structures, 8 % of them: 12 - int(11.04) + 1 is 2; the second and the third lowest are both lifted to 1.
    assert threshold_rank(12, 0.08) == 2
    removals = threshold_removals(scores, RemovalOrder.empty().removals, geometry, protected, 0.08)
    assert (removals.layers.tolist(), removals.indices.tolist()) == ([0, 0, 0], [0, 1, 2])


@pytest.mark.parametrize(
    ("structures", "ratio", "rank"), [(10, 0.0, 1), (10, 0.7, 8), (900, 0.7, 631), (1000, 0.1, 101), (7, 0.5, 5)]
)
def test_the_rank_of_the_threshold(structures, ratio, rank):
    assert threshold_rank(structures, ratio) == rank
    assert structures - int(structures * (1 - torch.tensor(ratio))) + 1 == rank


def test_ratios_are_those_of_torch():
    for steps in (2, 3, 7, 112, 280):
        assert structure_ratios(steps, 0.7) == torch.linspace(0, 0.7, steps).tolist()
        assert structure_ratios(steps, 0.7)[0] == 0
    assert structure_ratios(1, 0.7) == [float(np.float32(0.7))]


# ---- the user's path ----


def _prune(directory: Path, model: Path, calibration: dict[str, Any], **sections: Any) -> dict[str, np.ndarray]:
    """The tables of the removal order that `gisp prune` writes for a recipe."""
    recipe = directory / "recipe.yaml"
    value = {
        "name": "compat",
        "model": {"source": str(model), "dtype": "float32"},
        "calibration": calibration,
        "importance": {"compat": "reference"},
        "publish": {"store": "file:///unused", "gate": {"max_perplexity_ratio": None}},
        **sections,
    }
    recipe.write_text(yaml.safe_dump(value))
    done = subprocess.run(
        [sys.executable, "-m", "gisp_tasks.cli", "prune", str(recipe), "--out", str(directory / "out"), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return load_file(json.loads(done.stdout)["removal_order"])


def _by_step(order: dict[str, np.ndarray], steps: int) -> list[KeepSets]:
    """What the file says is left after each step."""
    alive = [
        [(order[f"{kind}.step"] == -1) | (order[f"{kind}.step"] > step) for kind in ("attention", "mlp")]
        for step in range(1, steps + 1)
    ]
    return [KeepSets(*tables) for tables in alive]


def test_gisp_prune_of_token_ids_is_the_referees(build_tiny, stories, tmp_path: Path):
    model = build_tiny(
        **{**DEEP, "vocab_size": 512, "hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 5},
        head_dim=4,
        tie_word_embeddings=True,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories.path / name, model.path / name)
    tokens = tokens_of(model.config, sequences=8, length=20)
    np.save(tmp_path / "tokens.npy", tokens)
    order = _prune(
        tmp_path,
        model.path,
        {"dataset": "tokens", "path": str(tmp_path / "tokens.npy"), "sequences": 8, "sequence_length": 20},
        pruning={"levels": [0.2], "steps": 5},
    )
    expected = referee_of_perplexity(model.load(), tokens, ratio=0.7, steps=5)
    assert min(iteration.gap for iteration in expected) > SAFE_GAP, "another seed: float32 cannot decide on this data"
    assert_equal_steps(_by_step(order, 5), expected)


def test_gisp_prune_of_items_of_ids_is_the_referees(stories, tmp_path: Path):
    items = random_items(512, 10)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    order = _prune(
        tmp_path,
        stories.path,
        {"dataset": "items", "path": str(tmp_path / "items.jsonl"), "sequences": 100, "sequence_length": 64},
        objective="margin",
        pruning={"levels": [0.2], "steps": 4, "structure_ratio": 0.5},
    )
    expected = list(
        referee.iterations(
            stories.load(),
            structure_ratio=0.5,
            num_iterations=4,
            gradients=lambda m: referee.margin_gradients(m, items),
        )
    )
    assert min(iteration.gap for iteration in expected) > SAFE_GAP, "another seed: float32 cannot decide on this data"
    assert order["attention.step"].shape == (5, 8)
    assert_equal_steps(_by_step(order, 4), expected)


# ---- what a plan refuses ----


def plan_of(**pruning: Any) -> Callable[[Geometry], Any]:
    recipe = Recipe.parse(
        {
            "name": "compat",
            "model": {"source": "model"},
            "calibration": {"dataset": "embedded", "sequence_length": 16},
            "importance": {"compat": "reference"},
            "pruning": {"width_multiple": 1, **pruning},
            "publish": {"store": "file:///tmp/store", "gate": {"max_perplexity_ratio": None}},
        }
    )
    return lambda geometry: make_plan(recipe, geometry)


def test_ratios_that_would_reach_skipped_layers_are_refused():
    geometry = small_geometry(10, 2, 8)  # 80 of 100 structures are in layers that are not skipped
    plan = plan_of(levels=[0.2], structure_ratio=0.789)(geometry)
    assert threshold_rank(100, plan.steps[-1].structure_ratio) == 80
    with pytest.raises(InputError, match=r"structure_ratio=0\.795 .* takes 81 of .* 100 .* leaves 80; lower"):
        plan_of(levels=[0.2], structure_ratio=0.795)(geometry)


def test_levels_that_no_order_could_reach_are_refused():
    with pytest.raises(
        InputError, match=r"levels\[0\]=0\.9 was asked, but .* reference skips 2 of 10 layers.* lower the level"
    ):
        plan_of(levels=[0.9], structure_ratio=0.7)(small_geometry(10, 2, 8))


def test_levels_complete_after_the_last_step():
    plan = plan_of(levels=[0.1, 0.2], steps=4)(small_geometry(10, 2, 8))
    assert [step.completes for step in plan.steps] == [(), (), (), ("sp10", "sp20")]
    assert [step.structure_ratio for step in plan.steps] == structure_ratios(4, 0.7)
    assert {step.target_sparsity for step in plan.steps} == {None}
