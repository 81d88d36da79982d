"""The gate: each check on its own, at its limit and beyond it."""

from typing import Any

import pytest

from gisp_tasks.errors import InputError
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.recipe import Recipe
from gisp_tasks.report import gate_value
from gisp_tasks.tasks.gate import judge

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
EVALUATION = {"wikitext2": {"windows": [32, 64]}, "gsm8k": {}, "commonsense_qa": {}}
DENSE = {"wikitext2_ppl_token_w32": 10.0, "gsm8k_exact_match_flexible": 0.9, "commonsense_qa_acc": 0.625}
PROOF = {"max_logit_difference": 1e-5, "tolerance": 2e-4, "greedy_equal": True}


def recipe(gate: dict[str, Any], evaluation: dict[str, Any] = EVALUATION) -> Recipe:
    return Recipe.parse(
        {
            "name": "gated",
            "model": {"source": "a/model"},
            "calibration": {"dataset": "embedded"},
            "evaluation": evaluation,
            "publish": {"store": "file:///srv", "gate": gate},
        }
    )


def verdict(
    gate: dict[str, Any], metrics: dict[str, float] = DENSE, proof: dict[str, Any] = PROOF, size: int = 1000
) -> dict[str, Any]:
    record = {"evaluation": {"metrics": metrics}, "reload": proof, "bytes": size}
    return judge(recipe(gate), geometry_of(CONFIG), record=record, dense=DENSE)


def failed(judged: dict[str, Any]) -> list[str]:
    assert judged["passed"] == all(check["passed"] for check in judged["checks"])
    return [check["name"] for check in judged["checks"] if not check["passed"]]


def test_the_reload_proof_is_always_checked() -> None:
    judged = verdict({"max_perplexity_ratio": None})
    assert [check["name"] for check in judged["checks"]] == ["reload_logits", "reload_greedy"]
    assert failed(judged) == []
    assert failed(verdict({}, proof=PROOF | {"greedy_equal": False})) == ["reload_greedy"]
    assert failed(verdict({}, proof=PROOF | {"max_logit_difference": 3e-4})) == ["reload_logits"]


@pytest.mark.parametrize(("perplexity", "passes"), [(39.9, True), (40.0, True), (40.1, False)])
def test_perplexity_is_taken_in_the_first_window(perplexity: float, passes: bool) -> None:
    judged = verdict({}, DENSE | {"wikitext2_ppl_token_w32": perplexity, "wikitext2_ppl_token_w64": 1e9})
    assert failed(judged) == ([] if passes else ["perplexity_ratio"])
    assert judged["checks"][-1]["value"] == pytest.approx(perplexity / 10)


@pytest.mark.parametrize("metric", ["gsm8k_exact_match_flexible", "commonsense_qa_acc"])
def test_accuracy_may_drop_by_the_limit_in_every_task(metric: str) -> None:
    gate = {"max_accuracy_drop": 0.2}
    assert DENSE["gsm8k_exact_match_flexible"] - 0.7 > 0.2  # 0.9 - 0.7 in floating point
    at_limit = verdict(gate, DENSE | {metric: DENSE[metric] - 0.2})
    assert failed(at_limit) == []
    judged = verdict(gate, DENSE | {metric: DENSE[metric] - 0.201})
    assert failed(judged) == ["accuracy_drop"]
    drops = {check["metric"]: check["passed"] for check in judged["checks"] if check["name"] == "accuracy_drop"}
    assert drops == {name: name != metric for name in ("gsm8k_exact_match_flexible", "commonsense_qa_acc")}
    assert failed(verdict(gate, DENSE | {metric: 1.0})) == []


def test_bytes_of_the_checkpoint() -> None:
    assert failed(verdict({"max_bytes": 1000})) == []
    assert failed(verdict({"max_bytes": 999})) == ["bytes"]


@pytest.mark.parametrize(
    ("evaluation", "metrics"),
    [
        ({"wikitext2": {}, "gsm8k": {"limit": 0}}, ()),
        ({"wikitext2": {}, "embedded_arithmetic": {"limit": 3}}, ("embedded_arithmetic_exact_match_flexible",)),
        ({"wikitext2": {}, "commonsense_qa": {}}, ("commonsense_qa_acc",)),
    ],
)
def test_an_accuracy_gate_needs_a_task_that_measures_it(evaluation: dict[str, Any], metrics: tuple[str, ...]) -> None:
    assert recipe({}, evaluation).evaluation.accuracy_metrics == metrics
    if metrics:
        recipe({"max_accuracy_drop": 0.1}, evaluation)
        return
    with pytest.raises(InputError, match="max_accuracy_drop is set, but the recipe measures no accuracy"):
        recipe({"max_accuracy_drop": 0.1}, evaluation)


def test_values_read_as_what_they_are() -> None:
    assert [gate_value(value) for value in (True, False, 1234567, 0.123456)] == ["yes", "no", "1,234,567", "0.1235"]
