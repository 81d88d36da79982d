"""Accuracy on the seven commonsense tasks, by lm-eval's own tasks, and the mean of the seven."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from gisp_tasks.evaluation.harness import (
    HARNESS,
    HarnessResult,
    TaskRows,
    TaskRun,
    language_model,
    num_longer,
    run_task,
)
from gisp_tasks.recipe import ChoiceEvaluation

logger = logging.getLogger(__name__)

NAME = "commonsense_qa"
# Task -> its file below lm-eval's folder of tasks.
_CONFIG_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
}


def choice_accuracy(
    model: Any, tokenizer: Any, *, rows: Mapping[str, TaskRows], section: ChoiceEvaluation
) -> dict[str, HarnessResult]:
    """Let the model choose the likeliest answer of each question, and count the right ones.

    The likelihood of an answer is the sum over its tokens (``acc``), or that sum divided by the answer's length in
    characters (``acc_norm``, of the tasks for which lm-eval computes it). A question with an answer that does not fit
    into the model's context is cut from the left, as lm-eval does; the number of such pairs is recorded and logged.

    Args:
        model: a causal language model of transformers; it is put into evaluation mode.
        tokenizer: its tokenizer; not changed.
        rows: task -> labelled rows; the first ``section.limit`` of each are asked.
        section: shots, limit and batch size.

    Returns:
        A result for each task, with ``<task>_acc``, ``<task>_acc_norm`` and their standard errors; and one named
        ``commonsense_qa`` with two means, in which each task has the same weight: ``_acc``, of the plain accuracies,
        and ``_acc_norm``, of the normalised ones where a task has one (all but BoolQ and WinoGrande). Both are in use,
        and the paper says only that it takes the mean of the seven: compare like with like. The protocol names the
        metrics that went into each.

    Raises:
        InputError: a task has too few rows.

    Source: the paper's zero-shot evaluation (METHOD A7): these seven tasks through lm-eval without examples.
    """
    lm = language_model(model, tokenizer, batch_size=section.batch_size)
    results = {}
    for task, task_rows in rows.items():
        asked = TaskRows(task_rows.evaluated[: section.limit], task_rows.examples)
        run = run_task(lm, _CONFIG_FILES[task], rows=asked, shots=section.shots)
        results[task] = _result(lm, run, task, section)
        logger.info("%s: accuracy %.4f", task, results[task].metrics[f"{task}_acc"])
    return {**results, NAME: _mean(results, section)}


def _result(lm: Any, run: TaskRun, task: str, section: ChoiceEvaluation) -> HarnessResult:
    metrics: dict[str, float] = {}
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in run.scores:
            metrics |= run.metric(f"{metric},none", f"{task}_{metric}")
    protocol = {
        **run.protocol,
        "limit": section.limit,
        "batch_size": section.batch_size,
        "context": lm.max_length,
        "num_cut_pairs": _num_cut_pairs(lm, run, task),
    }
    return HarnessResult(metrics, protocol)


def _num_cut_pairs(lm: Any, run: TaskRun, task: str) -> int:
    """How many pairs of question and answer lm-eval had to cut; said aloud when there are any."""
    pairs = ["".join(instance.args) for instance in run.task.instances]
    # The last token is only predicted, so it takes no place.
    num_cut = num_longer(lm, pairs, room=lm.max_length + 1)
    if num_cut:
        logger.warning(
            "%s: %d of %d pairs of question and answer were cut from the left: they are longer than the model's "
            "context of %d tokens",
            task,
            num_cut,
            len(pairs),
            lm.max_length,
        )
    return num_cut


def _mean(results: Mapping[str, HarnessResult], section: ChoiceEvaluation) -> HarnessResult:
    """Both means over the tasks, each task with the same weight.

    The standard error is the root of the sum of squares over the number of tasks, which are independent samples; there
    is none where a task has none.
    """
    metrics: dict[str, float] = {}
    mean_of: dict[str, list[str]] = {}
    for kind in ("acc", "acc_norm"):
        name = f"{NAME}_{kind}"
        parts = {task: _preferred(task, kind, result.metrics) for task, result in results.items()}
        metrics[name] = sum(result.metrics[parts[task]] for task, result in results.items()) / len(results)
        errors = [result.metrics.get(f"{parts[task]}_stderr", math.nan) for task, result in results.items()]
        if math.isfinite(error := math.hypot(*errors) / len(errors)):
            metrics[f"{name}_stderr"] = error
        mean_of[name] = list(parts.values())
    protocol = {
        "harness": HARNESS,
        "tasks": {task: result.protocol["task_version"] for task, result in results.items()},
        "mean_of": mean_of,
        "shots": section.shots,
        "num_samples": sum(result.protocol["num_samples"] for result in results.values()),
        "limit": section.limit,
        "batch_size": section.batch_size,
    }
    return HarnessResult(metrics, protocol)


def _preferred(task: str, kind: str, metrics: Mapping[str, float]) -> str:
    """The task's metric of that kind; plain accuracy where it has no other."""
    name = f"{task}_{kind}"
    return name if name in metrics else f"{task}_acc"
