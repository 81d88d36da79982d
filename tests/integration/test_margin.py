"""A recipe with the margin objective, from real questions to a removal order, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from gisp_tasks.cli import app


def _gisp(*arguments: str, data: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gisp_tasks.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GISP_DATA_ROOT": str(data), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture
def recipe(tmp_path: Path, testdata: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    value = {
        "name": "margin",
        "model": {"source": str(testdata / "models/stories260K"), "dtype": "float32"},
        "calibration": {
            "dataset": "commonsense_qa",
            "split": "train_surrogate",
            "sequences": 28,
            "sequence_length": 500,
        },
        "objective": "margin",
        "pruning": {"levels": [0.4], "steps": 2},
        "publish": {"store": f"file://{tmp_path}/store", "gate": {"max_perplexity_ratio": None}},
    }
    path.write_text(yaml.safe_dump(value))
    return path


def _pruned(recipe: Path, testdata: Path, name: str, *settings: str) -> tuple[dict[str, np.ndarray], Path]:
    """The removal order that `gisp prune` finds, and its record of the calibration data."""
    from safetensors.numpy import load_file

    out = recipe.parent / name
    done = _gisp("prune", str(recipe), "--out", str(out), "--json", *settings, data=testdata / "data")
    (record,) = out.glob("runs/*/calibration/tokens.json")
    return load_file(json.loads(done.stdout)["removal_order"]), record


def test_prune_by_the_margin_of_seven_tasks(recipe: Path, testdata: Path) -> None:
    order, record = _pruned(recipe, testdata, "out")
    assert all((order[f"{kind}.step"] == step).any() for kind in ("attention", "mlp") for step in (-1, 1, 2))
    description = json.loads(record.read_text())
    assert len(description["tasks"]) == len(description["source"]["tasks"]) == 7
    assert description["source"]["split"].startswith("train_surrogate (arc_easy: train, ")


def test_own_items_as_text_and_as_token_ids_give_one_order(recipe: Path, testdata: Path) -> None:
    items = [
        {"prompt": f"{name} had a {thing}. {name} was", "correct": f" happy with the {thing}.", "wrong": wrong}
        for name, thing, wrong in (
            ("Lily", "red ball", [" an angry stone of the sea", " ball ball red"]),
            ("Tim", "little dog", [" the the the"]),
            ("Ben", "big cake", [" under upon because", " seven", " it not is"]),
        )
    ]
    as_text = recipe.parent / "text.jsonl"
    as_text.write_text("".join(json.dumps(item) + "\n" for item in items))
    order, record = _pruned(recipe, testdata, "text", *_own(as_text))

    from safetensors.numpy import load_file

    as_ids = recipe.parent / "ids.jsonl"
    tokenized = _items(load_file(record.with_suffix(".safetensors")))
    assert [len(item["wrong_ids"]) for item in tokenized] == [2, 1, 3]
    as_ids.write_text("".join(json.dumps(item) + "\n" for item in tokenized))
    again, _ = _pruned(recipe, testdata, "ids", *_own(as_ids))
    assert order.keys() == again.keys()
    for key in order:
        assert (order[key] >= 0).any(), f"nothing of {key} was removed"
        np.testing.assert_array_equal(order[key], again[key])


def _own(path: Path) -> tuple[str, ...]:
    settings = {"dataset": "items", "split": "train", "path": str(path)}
    return tuple(part for key, value in settings.items() for part in ("--set", f"calibration.{key}={value}"))


def _items(arrays: dict[str, np.ndarray]) -> list[dict[str, list]]:
    """The items of a published set: each begins with its correct candidate, whose weights are positive."""
    items: list[dict[str, list]] = []
    for start, end in arrays["spans"]:
        tokens, weights = arrays["tokens"][start:end].tolist(), arrays["weights"][start:end]
        prompt = int(np.flatnonzero(weights)[0])
        if weights[prompt] > 0:
            items.append({"prompt_ids": tokens[:prompt], "correct_ids": tokens[prompt:], "wrong_ids": []})
        else:
            items[-1]["wrong_ids"].append(tokens[prompt:])
    return items


def test_the_wrong_data_set_is_refused_before_anything_is_written(recipe: Path, testdata: Path) -> None:
    arguments = ("prune", str(recipe), "--out", str(recipe.parent / "out"), "--set", "objective=perplexity")
    done = _gisp(*arguments, data=testdata / "data", status=2)
    assert "objective=perplexity would teach the wrong answers" in done.stderr
    assert not (recipe.parent / "out" / "runs").exists()


def test_the_plan_speaks_of_items_and_their_budget(recipe: Path) -> None:
    said = " ".join(CliRunner().invoke(app, ["plan", str(recipe)]).output.split())
    assert "scoring: items within a budget of 14,000 tokens, 2,048 tokens at once, about " in said
