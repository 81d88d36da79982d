"""What a person sees of a finished run: a table that stays small, and the tasks behind a mean on the page."""

import io
from typing import Any

from rich.console import Console

from gisp_tasks.console import ladder_table
from gisp_tasks.recipe import COMMONSENSE_TASKS
from gisp_tasks.report import metric_names, render

PERPLEXITY = "wikitext2_ppl_token_w128"


def level(name: str, sparsity: float, accuracy: float) -> dict[str, Any]:
    metrics = {PERPLEXITY: 10 / accuracy, f"{PERPLEXITY}_stderr": 7.7}
    for task in COMMONSENSE_TASKS:
        metrics |= {f"{task}_acc": accuracy, f"{task}_acc_stderr": 0.0125, f"{task}_acc_norm": accuracy / 2}
    metrics |= {"commonsense_qa_acc": accuracy, "commonsense_qa_acc_stderr": 0.005}
    return {
        "name": name,
        "param_sparsity": sparsity,
        "parameters": 1_000_000,
        "bytes": 2_000_000,
        "metrics": metrics,
        "uri": f"file:///runs/{name}",
        "model_name": None,
        "model_version": None,
        "alias": None,
        "gate": "passed" if sparsity else None,
    }


SUMMARY = {
    "run_id": "0123456789ab",
    "store": "file:///runs",
    "manifest_sha256": "0" * 64,
    "levels": [level("dense", 0.0, 0.625), level("sp20", 0.2, 0.5)],
    "step_seconds": [1.5],
}
_SOURCE = {"dataset": "d", "split": "validation", "origin": "mirror"}
MANIFEST = {
    "recipe": {"name": "r", "objective": "perplexity", "importance": {"score": "taylor", "normaliser": "elements"}},
    "model": {"source": "m", "revision": None},
    "calibration": {
        "source": _SOURCE,
        "sequences": 1,
        "num_tokens": 2,
        "seed": 0,
        "contamination": {"evaluations": {}},
    },
    "levels": [
        {
            "evaluation": {
                "protocol": {
                    PERPLEXITY: {"source": _SOURCE, "num_targets": 254},
                    "piqa_acc": {"source": _SOURCE, "num_samples": 438, "shots": 0},
                }
            }
        }
    ],
    "steps": [{"number": 1, "objective": 2.0, "target_sparsity": 0.2, "structure_ratio": None, "completes": ["sp20"]}],
    "environment": {
        "package": "0",
        "packages": {"torch": "2", "transformers": "5"},
        "platform": "p",
        "accelerator": None,
    },
    "deviations": [],
}


def test_a_metric_is_a_headline_or_of_one_task_and_no_standard_error():
    headline, by_task = metric_names(SUMMARY["levels"])
    assert headline == [PERPLEXITY, "commonsense_qa_acc"]
    assert by_task == [f"{task}_{kind}" for task in COMMONSENSE_TASKS for kind in ("acc", "acc_norm")]


def test_the_terminal_shows_the_mean_only():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(ladder_table(SUMMARY))
    text = console.export_text()
    (line,) = [line for line in text.splitlines() if "commonsense_qa_acc" in line]
    assert "0.625" in line
    assert " 0.5 " in line
    assert not any(f" {task}_acc" in text for task in COMMONSENSE_TASKS)


def test_the_page_shows_the_tasks_with_their_errors_and_their_data():
    page = render(SUMMARY, manifest=MANIFEST, curve_metric=None)
    ladder, _, rest = page.partition("Task by task")
    assert "<th>commonsense_qa_acc</th>" in ladder
    assert "piqa_acc" not in ladder
    assert '<tr><td>piqa_acc</td><td>0.6250 <span class="note">± 0.0125</span></td><td>0.5000' in rest
    assert "<tr><td>piqa_acc_norm</td><td>0.3125</td>" in rest
    assert "438 questions, 0 shots" in rest


def test_a_page_without_such_tasks_has_no_table_of_them():
    levels = [{**part, "metrics": {PERPLEXITY: 3.0}} for part in SUMMARY["levels"]]
    page = render({**SUMMARY, "levels": levels}, manifest=MANIFEST, curve_metric=None)
    assert "Task by task" not in page
    assert "254 tokens" in page


def test_steps_that_count_structures_say_so():
    """Under compat: reference no step has a sparsity to reach; the page used to fail on it."""
    assert "<td>20.00 %</td>" in render(SUMMARY, manifest=MANIFEST, curve_metric=None)
    step = {**MANIFEST["steps"][0], "target_sparsity": None, "structure_ratio": 0.0}
    page = render(SUMMARY, manifest={**MANIFEST, "steps": [step]}, curve_metric=None)
    assert "<td>0.00 % of the heads and channels</td>" in page


def test_the_page_shows_each_check_of_the_gate():
    checks = [
        {"name": "reload_greedy", "metric": "greedy_equal", "value": True, "limit": True, "passed": True},
        {"name": "bytes", "metric": "bytes", "value": 2_000_000, "limit": 1_500_000, "passed": False},
    ]
    judged = {"name": "sp20", "gate": {"passed": False, "checks": checks}}
    page = render(SUMMARY, manifest={**MANIFEST, "levels": [*MANIFEST["levels"], judged]}, curve_metric=None)
    _, _, gate = page.partition("The gate")
    assert '<td class="text">bytes</td><td>1,500,000</td>\n<td class="failed">2,000,000</td>' in gate
    assert '<td>yes</td>\n<td class="passed">yes</td>' in gate
    assert "The gate" not in render(SUMMARY, manifest=MANIFEST, curve_metric=None)
