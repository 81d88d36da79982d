"""An evaluation from the recipe's section to metrics and protocols, on real rows of a mirror."""

import pytest

from gisp_tasks.data.multiple_choice import TASKS
from gisp_tasks.recipe import ChoiceEvaluation, ProblemEvaluation, Recipe
from gisp_tasks.refs import canonical_json, sha256_file
from gisp_tasks.tasks.measure import evaluation_sources, measure


@pytest.fixture
def checkpoint(testdata, monkeypatch):
    monkeypatch.setenv("GISP_DATA_ROOT", str(testdata / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return testdata / "models/stories260K"


def recipe(**evaluation):
    return Recipe.parse(
        {
            "name": "measured",
            "model": {"source": "some/model"},
            "calibration": {"dataset": "embedded"},
            "evaluation": evaluation,
            "publish": {"store": "file:///srv", "gate": {"max_perplexity_ratio": None}},
        }
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_each_metric_of_commonsense_qa_names_its_rows(checkpoint, testdata, split):
    result = measure(checkpoint, "commonsense_qa", ChoiceEvaluation(limit=2, split=split), dtype="float32")
    assert canonical_json(result)
    metrics, protocol = result["metrics"], result["protocol"]
    assert metrics.keys() == protocol.keys()
    assert {f"{task}_acc" for task in TASKS} | {"commonsense_qa_acc", "commonsense_qa_acc_norm"} <= metrics.keys()
    for task in TASKS:
        measured = split if task in ("arc_easy", "arc_challenge", "openbookqa") else "validation"
        of_task = protocol[f"{task}_acc"]
        (file,) = of_task["source"]["files"]
        assert file["name"] == f"{task}/{measured}.parquet"
        assert file["sha256"] == sha256_file(testdata / "data" / file["name"])
        assert (of_task["num_samples"], of_task["shots"], of_task["dtype"]) == (2, 0, "float32")
        assert "examples" not in of_task
    mean = protocol["commonsense_qa_acc"]
    assert (mean["source"]["dataset"], mean["num_samples"]) == ("commonsense_qa", 14)
    assert mean["source"]["tasks"].keys() == set(TASKS)
    assert mean["source"]["split"].startswith(split)


@pytest.mark.parametrize(("shots", "num_files"), [(0, 1), (1, 2)])
def test_solved_examples_are_read_and_recorded_only_with_shots(checkpoint, testdata, shots, num_files):
    section = ProblemEvaluation(shots=shots, limit=1, max_new_tokens=2, limit_solutions=1)
    assert len(evaluation_sources(recipe(gsm8k=section))) == num_files
    protocol = measure(checkpoint, "gsm8k", section, dtype="float32")["protocol"]
    exact = protocol["gsm8k_exact_match_strict"]
    assert exact["source"]["files"][0]["sha256"] == sha256_file(testdata / "data/gsm8k/test.parquet")
    assert ("examples" in exact) == bool(shots)
    if shots:
        assert exact["examples"]["files"][0]["sha256"] == sha256_file(testdata / "data/gsm8k/train.parquet")
    assert "examples" not in protocol["gsm8k_solution_ppl_token"]


def test_the_sources_of_commonsense_qa_are_found_before_a_run(checkpoint):
    found = evaluation_sources(recipe(commonsense_qa=ChoiceEvaluation(split="test")))
    assert {name: source.split for name, source in found.items()} == {
        **dict.fromkeys(TASKS, "validation"),
        **dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa"), "test"),
    }
