"""Every shipped recipe, planned for the model that it names: published sizes, levels within reach."""

from pathlib import Path
from typing import Any

import pytest

from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.plan import Plan, make_plan
from gisp_tasks.pruning.schedule import fused_steps
from gisp_tasks.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "dags" / "recipes").glob("*.yaml"))


def llama(hidden: int, width: int, layers: int, heads: int, groups: int, vocab: int, **others: Any) -> dict[str, Any]:
    """A config.json; ``others`` are keys that not every model has."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **others,
    }


_SMOLLM2 = llama(576, 1536, 30, 9, 3, 49152, max_position_embeddings=8192, tie_word_embeddings=True)
_LLAMA3 = {"max_position_embeddings": 8192, "attention_bias": False}
_R1 = {"max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False}
_MISTRAL = {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": None}
_QWEN3 = {"model_type": "qwen3", "max_position_embeddings": 40960, "head_dim": 128, "attention_bias": False}

# What the models' own pages state: source -> (sizes of config.json, parameters).
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "demo/model": (_SMOLLM2, 134_515_008),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (_SMOLLM2, 134_515_008),
    "meta-llama/Llama-2-7b-hf": (
        llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096),
        6_738_415_616,
    ),
    "meta-llama/Llama-2-13b-hf": (
        llama(5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096),
        13_015_864_320,
    ),
    "meta-llama/Meta-Llama-3-8B": (llama(4096, 14336, 32, 32, 8, 128256, **_LLAMA3), 8_030_261_248),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (llama(4096, 14336, 32, 32, 8, 128256, **_R1), 8_030_261_248),
    "mistralai/Mistral-7B-v0.3": (llama(4096, 14336, 32, 32, 8, 32768, **_MISTRAL), 7_248_023_552),
    "Qwen/Qwen3-8B": (llama(4096, 12288, 36, 32, 8, 151936, **_QWEN3), 8_190_735_360),
}
# Published hyper-parameters: steps of a model with 2000 windows of 256 tokens of C4.
STEPS = {
    "llama2-7b": 112,
    "llama2-13b": 280,
    "llama3-8b": 112,
    "mistral-7b-v0.3": 112,
    "deepseek-r1-distill-llama-8b": 112,
    "qwen3-8b": 112,
}
MAX_STEP_TASKS = 30


def load(path: Path) -> tuple[Recipe, Plan]:
    recipe = Recipe.load(path)
    return recipe, make_plan(recipe, geometry_of(MODELS[recipe.model.source][0]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_plan_is_for_the_published_model_and_reaches_every_level(path: Path):
    recipe, plan = load(path)  # a level that cannot be reached is refused here
    assert recipe.name == path.stem
    assert plan.dense_parameters == MODELS[recipe.model.source][1]
    assert [name for step in plan.steps for name in step.completes] == list(recipe.level_names)
    assert plan.levels[-1].after_step == len(plan.steps) == recipe.pruning.steps
    assert plan.dense_parameters > plan.levels[0].max_parameters > plan.levels[-1].max_parameters


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_graph_stays_small_and_no_level_waits_long(path: Path):
    recipe, plan = load(path)
    tasks = fused_steps(recipe.pruning.steps, recipe.airflow.steps_per_task)
    assert len(tasks) <= MAX_STEP_TASKS
    for level in plan.levels:
        end = next(task[-1] for task in tasks if level.after_step in task)
        assert end - level.after_step <= max(5, recipe.pruning.steps // 20), level.name


@pytest.mark.parametrize("name", STEPS)
def test_large_models_have_the_published_hyper_parameters(name: str):
    recipe, _ = load(RECIPES[0].parent / f"{name}.yaml")
    calibration = recipe.calibration
    assert (calibration.dataset, calibration.sequences, calibration.sequence_length) == ("c4", 2000, 256)
    assert (recipe.pruning.steps, recipe.model.dtype, calibration.seed) == (STEPS[name], "bfloat16", 0)
    assert (recipe.airflow.pool, recipe.airflow.queue) == ("gpu", "gpu")
    assert recipe.evaluation.tasks == ("wikitext2", "gsm8k", "commonsense_qa")
    commonsense = recipe.evaluation.commonsense_qa
    assert (commonsense.shots, commonsense.limit, commonsense.split) == (0, None, "test")


def test_every_model_of_the_table_has_a_recipe():
    assert {Recipe.load(path).model.source for path in RECIPES} == set(MODELS)
