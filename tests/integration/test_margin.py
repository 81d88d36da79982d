"""A recipe with the margin objective, from real questions to a removal order, through the command line."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

Prune = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def prune(gisp: Any, testdata: Path) -> Prune:
    """`gisp prune` on the mirror."""
    return lambda *arguments, status=0: gisp.call(
        *("prune", *arguments), status=status, environment={"GISP_DATA_ROOT": str(testdata / "data")}
    )


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


def _pruned(prune: Prune, recipe: Path, name: str, *settings: str) -> tuple[dict[str, np.ndarray], Path]:
    """The removal order that `gisp prune` finds, and its record of the calibration data."""
    from safetensors.numpy import load_file

    out = recipe.parent / name
    done = prune(str(recipe), "--out", str(out), "--json", *settings)
    (record,) = out.glob("runs/*/calibration/tokens.json")
    return load_file(json.loads(done.stdout)["removal_order"]), record


def test_prune_by_the_margin_of_seven_tasks(prune: Prune, recipe: Path) -> None:
    order, record = _pruned(prune, recipe, "out")
    assert all((order[f"{kind}.step"] == step).any() for kind in ("attention", "mlp") for step in (-1, 1, 2))
    description = json.loads(record.read_text())
    assert len(description["tasks"]) == len(description["source"]["tasks"]) == 7
    assert description["source"]["split"].startswith("train_surrogate (arc_easy: train, ")


def test_own_items_as_text_and_as_token_ids_give_one_order(prune: Prune, recipe: Path) -> None:
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
    order, record = _pruned(prune, recipe, "text", *_own(as_text))

    from safetensors.numpy import load_file

    as_ids = recipe.parent / "ids.jsonl"
    tokenized = _items(load_file(record.with_suffix(".safetensors")))
    assert [len(item["wrong_ids"]) for item in tokenized] == [2, 1, 3]
    as_ids.write_text("".join(json.dumps(item) + "\n" for item in tokenized))
    again, _ = _pruned(prune, recipe, "ids", *_own(as_ids))
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


def test_the_wrong_data_set_is_refused_before_anything_is_written(prune: Prune, recipe: Path) -> None:
    arguments = (str(recipe), "--out", str(recipe.parent / "out"), "--set", "objective=perplexity")
    done = prune(*arguments, status=2)
    assert "objective=perplexity would teach the wrong answers" in done.stderr
    assert not (recipe.parent / "out" / "runs").exists()


def test_the_plan_speaks_of_items_and_their_budget(gisp: Any, recipe: Path) -> None:
    said = " ".join(gisp.call("plan", str(recipe)).stdout.split())
    assert "scoring: items within a budget of 14,000 tokens, 2,048 tokens at once, about " in said
