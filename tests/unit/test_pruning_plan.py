"""The schedule, and what a recipe means for a model before anything is loaded."""

import json

import numpy as np
import pytest

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.plan import Keys, Plan, make_plan
from gisp_tasks.pruning.ranking import limits_of, next_removals
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.schedule import completing_steps, fused_steps, step_targets
from gisp_tasks.pruning.scores import StructureScores
from gisp_tasks.pruning.structures import Geometry
from gisp_tasks.recipe import Recipe

GEOMETRY = Geometry(
    family="llama",
    num_layers=10,
    hidden_size=64,
    num_query_heads=8,
    num_kv_groups=4,
    head_dim=8,
    intermediate_size=172,
    vocab_size=512,
    max_positions=512,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    norm_parameters=128,
    other_parameters=512 * 64 + 64,
)


def recipe(**pruning: object) -> Recipe:
    return Recipe.parse(
        {
            "name": "plan",
            "model": {"source": "model", "dtype": "float32"},
            "calibration": {"dataset": "embedded", "sequences": 10, "sequence_length": 256},
            "pruning": {"levels": [0.2, 0.3, 0.5], "steps": 5, "width_multiple": 4, **pruning},
            "publish": {"store": "file:///tmp/store", "gate": {"max_perplexity_ratio": None}},
        }
    )


def plan(**pruning: object) -> Plan:
    return make_plan(recipe(**pruning), GEOMETRY)


# ---- schedule ----


def test_targets_are_linear_and_end_at_the_last_level():
    assert step_targets(5, 0.5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert step_targets(1, 0.7) == [0.7]


@pytest.mark.parametrize(
    ("levels", "steps", "expected"),
    [
        ([0.2, 0.3, 0.5], 5, [2, 3, 5]),
        ([0.2, 0.3, 0.4, 0.5], 30, [12, 18, 24, 30]),
        ([0.1, 0.5], 1, [1, 1]),
        ([0.301, 0.5], 5, [4, 5]),
        ([0.001, 0.7], 7, [1, 7]),
    ],
)
def test_a_level_is_complete_after_the_first_step_that_reaches_it(levels, steps, expected):
    assert completing_steps(levels, steps) == expected


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 112, 280])
def test_the_last_level_completes_with_the_last_step_whatever_the_rounding(steps):
    for last in (0.3, 0.35, 0.5, 0.7, 0.99):
        assert completing_steps([last], steps) == [steps]
        for k in range(1, steps):
            assert completing_steps([last * k / steps, last], steps)[0] == k


@pytest.mark.parametrize(("steps", "per_task"), [(5, 1), (5, 2), (5, 5), (5, 9), (1, 1), (30, 7)])
def test_fused_steps_are_consecutive_and_complete(steps, per_task):
    tasks = fused_steps(steps, per_task)
    assert [step for task in tasks for step in task] == list(range(1, steps + 1))
    assert all(1 <= len(task) <= per_task for task in tasks)
    assert len(tasks) == -(-steps // per_task)


# ---- plan ----


def test_levels_and_steps_of_a_plan():
    made = plan()
    assert [level.name for level in made.levels] == ["sp20", "sp30", "sp50"]
    assert [step.number for step in made.steps] == [1, 2, 3, 4, 5]
    assert [step.completes for step in made.steps] == [(), ("sp20",), ("sp30",), (), ("sp50",)]
    assert made.level("sp30").after_step == 3
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 172 + 128
    assert made.dense_parameters == 10 * layer + 512 * 64 + 64
    assert made.dense_bytes == 4 * made.dense_parameters
    for level in made.levels:
        assert level.max_parameters == int(10 * layer * (1 - level.sparsity) + 1e-3) + 512 * 64 + 64
        assert level.max_bytes == 4 * level.max_parameters


def test_a_plan_survives_json_and_is_a_pure_function():
    made = plan()
    assert json.loads(json.dumps(made.to_dict())) == json.loads(json.dumps(plan().to_dict()))
    assert json.loads(json.dumps(made.to_dict()))["geometry"]["num_kv_groups"] == 4


def test_memory_is_that_of_a_micro_batch():
    made = plan()
    assert made.micro_batch_tokens == 2048
    least = made.dense_bytes + 4 * GEOMETRY.decoder_parameters + 4 * 2048 * 512
    assert made.scoring_bytes > least
    halved = Recipe.parse({**recipe().model_dump(), "model": {"source": "model", "dtype": "bfloat16"}})
    saved = made.scoring_bytes - make_plan(halved, GEOMETRY).scoring_bytes
    assert saved > made.dense_bytes / 2, "half-precision activations are smaller too"


def test_scoring_operations_shrink_with_the_model():
    tokens, dense, decoder = 2560, plan().dense_parameters, GEOMETRY.decoder_parameters
    expected = sum(6 * tokens * (dense - decoder * gone) for gone in (0, 0.1, 0.2, 0.3, 0.4))
    assert plan().scoring_flops == pytest.approx(expected)
    assert plan(steps=1).scoring_flops == pytest.approx(6 * tokens * dense)


def test_sequences_longer_than_the_context_are_refused():
    long = Recipe.parse({**recipe().model_dump(), "calibration": {"dataset": "embedded", "sequence_length": 513}})
    with pytest.raises(InputError, match=r"sequence_length=513 .* context of 512 tokens; lower it"):
        make_plan(long, GEOMETRY)
    fits = Recipe.parse({**recipe().model_dump(), "calibration": {"dataset": "embedded", "sequence_length": 512}})
    assert make_plan(fits, GEOMETRY).levels


def test_a_level_out_of_reach_is_refused_with_what_can_be_reached():
    protect = {"first_layers": 3, "last_layers": 2, "min_kv_groups": 2, "min_channels": 80}
    with pytest.raises(InputError, match=r"pruning\.levels\[2\]=0\.5 .* 5 of 10 layers, 2 kv groups and 80") as caught:
        plan(protect=protect)
    reach = float(str(caught.value).split("at most ")[1].split(";")[0])
    assert plan(levels=[reach], protect=protect).levels[0].sparsity == reach
    with pytest.raises(InputError, match="lower the level or protect less"):
        plan(levels=[reach + 0.001], protect=protect)


def test_what_a_plan_promises_ranking_keeps():
    settings = recipe(levels=[0.2, 0.62], protect={"first_layers": 2, "last_layers": 1, "min_channels": 8})
    made = make_plan(settings, GEOMETRY)
    limits = limits_of(settings.pruning.protect, 4, 10)
    generator = np.random.default_rng(0)
    order = RemovalOrder.empty()
    for step in made.steps:
        scores = StructureScores(
            generator.random((10, 4), dtype=np.float32), generator.random((10, 172), dtype=np.float32)
        )
        removals = next_removals(scores, order.removals, GEOMETRY, limits, step.target_sparsity)
        order = order.extend(removals, step.number)
        for name in step.completes:
            level = made.level(name)
            keep = order.level(level.sparsity, geometry=GEOMETRY, width_multiple=4)
            assert GEOMETRY.parameters_of(keep) + GEOMETRY.other_parameters <= level.max_parameters
    assert order.last_step == 5


def test_protecting_everything_is_refused():
    with pytest.raises(InputError, match="nothing can be removed"):
        plan(protect={"first_layers": 5, "last_layers": 5})


def test_artefact_names():
    assert Keys.step(7, "scores.safetensors") == "steps/0007/scores.safetensors"
    assert Keys.level("sp20", "model") == "levels/sp20/model"
