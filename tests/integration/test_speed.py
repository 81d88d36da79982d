"""Speed of a level and of the dense model, task by task: what is recorded, and that the first record stays."""

import json
from pathlib import Path
from typing import Any

import pytest

from gisp_tasks.tasks.evaluate import evaluate
from gisp_tasks.tasks.materialize import materialize
from gisp_tasks.tasks.prepare_calibration import prepare_calibration
from gisp_tasks.tasks.resolve_model import resolve_model
from gisp_tasks.tasks.runtime import Run
from gisp_tasks.tasks.score_and_prune import score_and_prune

DENSE_PARAMETERS = 260_032  # stories260K


def _recipe(testdata: Path, store: Path) -> dict[str, Any]:
    return {
        "name": "fast",
        "model": {"source": str(testdata / "models/stories260K"), "dtype": "float32"},
        "calibration": {"dataset": "wikitext2", "sequences": 16, "sequence_length": 64},
        "pruning": {"levels": [0.4], "steps": 2},
        "evaluation": {"speed": {"prompt_tokens": 64, "new_tokens": 4, "repetitions": 2}},
        "publish": {"store": f"file://{store}", "gate": {"max_perplexity_ratio": None}},
    }


@pytest.mark.usefixtures("mirror_of_stories")
def test_speed_of_a_level_beside_the_dense_model(testdata: Path, tmp_path: Path) -> None:
    recipe = _recipe(testdata, tmp_path / "store")
    plan = resolve_model(recipe)
    prepare_calibration(recipe, plan)
    model = materialize(recipe, plan, "sp40", score_and_prune(recipe, plan, [1, 2], None))
    published = evaluate(recipe, plan, "sp40", "speed", model)
    evaluate(recipe, plan, "dense", "speed", None)
    run = Run.open(recipe, plan)
    dense, level = (run.read_json(f"levels/{name}/evaluation/speed.json") for name in ("dense", "sp40"))
    config = json.loads((tmp_path / "store/runs" / run.run_id / "levels/sp40/model/config.json").read_text())
    groups = sum(layer["num_key_value_heads"] for layer in config["per_layer_config"].values())
    # Keys and values of heads of 8, in float32; 5 layers of 4 groups in the dense model.
    assert dense["metrics"]["speed_kv_cache_bytes_per_token"] == 5 * 4 * 2 * 8 * 4
    assert level["metrics"]["speed_kv_cache_bytes_per_token"] == groups * 2 * 8 * 4
    assert dense["metrics"]["speed_weight_bytes"] == 4 * DENSE_PARAMETERS
    assert level["metrics"]["speed_weight_bytes"] < 0.75 * 4 * DENSE_PARAMETERS
    facts = level["protocol"]["speed_prefill_over_dense"]
    for phase, tokens in (("prefill", 64), ("decode", 4)):
        rates = {}
        for name, measured in facts["measured"].items():
            first, second = measured[f"{phase}_seconds"]
            rates[name] = tokens / ((first + second) / 2)
            assert measured[f"{phase}_tokens_per_s"] == pytest.approx(rates[name])
        assert level["metrics"][f"speed_{phase}_over_dense"] == pytest.approx(rates["this"] / rates["dense"])
    assert "speed_prefill_over_dense" not in dense["metrics"]
    # Another attempt measures other seconds: what was published first stays.
    run.publish_observation("levels/sp40/evaluation/speed.json", {"metrics": {}, "protocol": {}})
    assert evaluate(recipe, plan, "sp40", "speed", model) == published
