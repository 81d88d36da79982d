"""A recipe with least squares, task by task: its levels are better, proven, and say how they were solved."""

import json
from pathlib import Path
from typing import Any

import pytest

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.compensation import RIDGES
from gisp_tasks.recipe import TextEvaluation
from gisp_tasks.tasks.materialize import materialize, materialize_from_order
from gisp_tasks.tasks.measure import measure
from gisp_tasks.tasks.prepare_calibration import prepare_calibration
from gisp_tasks.tasks.resolve_model import resolve_model
from gisp_tasks.tasks.runtime import Run
from gisp_tasks.tasks.score_and_prune import score_and_prune

TEXT = TextEvaluation(windows=(128,), limit_tokens=2049)
METRIC = "wikitext2_ppl_token_w128"


def _recipe(testdata: Path, store: Path, **pruning: Any) -> dict[str, Any]:
    return {
        "name": "compensated",
        "model": {"source": str(testdata / "models/stories260K"), "dtype": "float32"},
        "calibration": {"dataset": "wikitext2", "sequences": 16, "sequence_length": 64},
        "pruning": {"levels": [0.4], "steps": 2, **pruning},
        "evaluation": {"wikitext2": {"windows": [128], "limit_tokens": 2049}},
        "publish": {"store": f"file://{store}"},
    }


def _level(recipe: dict[str, Any]) -> tuple[Run, Path, Path]:
    """The run, the checkpoint of its level, and its removal order."""
    plan = resolve_model(recipe)
    prepare_calibration(recipe, plan)
    order = score_and_prune(recipe, plan, [1, 2], None)
    model = materialize(recipe, plan, "sp40", order)
    run = Run.open(recipe, plan)
    return run, Path(model["uri"].removeprefix("file://")), Path(order["uri"].removeprefix("file://"))


@pytest.mark.usefixtures("mirror_of_stories")
def test_a_compensated_level_is_better_and_says_how_it_was_made(testdata: Path, tmp_path: Path) -> None:
    own = {"dataset": "wikitext2", "sequences": 128, "sequence_length": 64, "seed": 1}
    solved = {"compensation": "least_squares", "compensation_data": own}
    run, checkpoint, order = _level(_recipe(testdata, tmp_path / "solved", **solved))
    _, plain, _ = _level(_recipe(testdata, tmp_path / "plain"))

    ppl = [
        measure(path, "wikitext2", TEXT, dtype="float32", trust_remote_code=True)["metrics"][METRIC]
        for path in (checkpoint, plain)
    ]
    assert ppl[0] < 0.9 * ppl[1]
    record = run.read_json("levels/sp40/compensation.json")
    assert record["method"] == "least_squares"
    assert record["projections"] == len(record["by_projection"]) == sum(record["ridges"].values())
    assert all(entry["ridge"] in RIDGES and 0 < entry["error"] < 1 for entry in record["by_projection"].values())
    assert run.read_json("calibration/compensation.json")["seed"] == 1
    assert run.compensation_set().num_sequences == 128
    # The proof is against the masked model with the same new weights, not against one that kept the old ones.
    proof = run.read_json("levels/sp40/reload.json")
    assert proof["max_logit_difference"] <= proof["tolerance"]
    assert proof["greedy_equal"]

    tokens = run.store.stat("calibration/compensation.safetensors")
    assert tokens is not None
    sequences = tmp_path / "tokens.npy"
    _save_rows(run, sequences)
    again = tmp_path / "again"
    model = run.recipe.model.source
    materialize_from_order(
        model, str(order), out=str(again), sparsity=0.4, width_multiple=32, dtype="float32", compensate=sequences
    )
    assert (again / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def _save_rows(run: Run, path: Path) -> None:
    """The sequences of a run as the token file that `gisp materialize --compensate` takes."""
    import numpy as np

    data = run.compensation_set()
    np.save(path, np.stack([data.tokens[start:end] for start, end in data.spans]))


@pytest.mark.usefixtures("mirror_of_stories")
def test_one_sequence_is_refused_before_anything_is_written(testdata: Path, tmp_path: Path) -> None:
    own = {"dataset": "wikitext2", "sequences": 1, "sequence_length": 64}
    recipe = _recipe(testdata, tmp_path / "store", compensation="least_squares", compensation_data=own)
    with pytest.raises(InputError, match="at least two are needed"):
        resolve_model(recipe)
    assert not list((tmp_path / "store").rglob("*.json"))


def test_data_without_a_use_is_refused(testdata: Path, tmp_path: Path) -> None:
    recipe = _recipe(testdata, tmp_path, compensation_data={"dataset": "wikitext2"})
    with pytest.raises(InputError, match="which reads no data"):
        resolve_model(json.loads(json.dumps(recipe)))
