"""Accuracy on the seven commonsense tasks: lm-eval's numbers against a naive loop over candidates."""

import logging
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_tasks.data.items import encode_pairs
from gisp_tasks.data.multiple_choice import TASKS, evaluated_split, harness_rows, questions
from gisp_tasks.errors import InputError
from gisp_tasks.evaluation import commonsense_qa
from gisp_tasks.evaluation.commonsense_qa import choice_accuracy
from gisp_tasks.evaluation.harness import TaskRows
from gisp_tasks.recipe import COMMONSENSE_TASKS, ChoiceEvaluation
from gisp_tasks.refs import canonical_json

ITEMS = 6
# Tasks whose answers lm-eval also compares by likelihood per character.
NORMALISED = [task for task in COMMONSENSE_TASKS if task not in ("boolq", "winogrande")]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a connection was tried: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def model(testdata: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(testdata / "models/stories260K", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(testdata: Path) -> Any:
    return AutoTokenizer.from_pretrained(testdata / "models/stories260K")


def read(testdata: Path, task: str, split: str = "validation", count: int = ITEMS) -> list[dict[str, Any]]:
    rows = pyarrow.parquet.read_table(testdata / f"data/{task}/{split}.parquet").slice(0, count).to_pylist()
    return harness_rows(task, rows, origin=task)


@pytest.fixture(scope="module")
def rows(testdata: Path) -> dict[str, TaskRows]:
    return {task: TaskRows(read(testdata, task)) for task in TASKS}


@contextmanager
def kept() -> Iterator[dict[str, Any]]:
    """lm-eval's object of each task that runs here, with what it asked."""
    tasks: dict[str, Any] = {}
    run_task = commonsense_qa.run_task

    def keep(*args: Any, **kwargs: Any) -> Any:
        run = run_task(*args, **kwargs)
        tasks[run.protocol["task"]] = run.task
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commonsense_qa, "run_task", keep)
        yield tasks


@pytest.fixture(scope="module")
def asked(model: Any, tokenizer: Any, rows: dict[str, TaskRows]) -> Any:
    """The results of all rows, and lm-eval's tasks."""
    with kept() as tasks:
        results = choice_accuracy(model, tokenizer, rows=rows, section=ChoiceEvaluation(batch_size=3))
    return results, tasks


@torch.no_grad()
def log_likelihood(model: Any, tokens: list[int], prompt_length: int) -> float:
    """Sum over the answer's tokens, one sequence at a time, cut from the left to the model's context."""
    cut = max(0, len(tokens) - 1 - model.config.max_position_embeddings)
    ids = tokens[cut:]
    logits = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return sum(logits[at - 1, ids[at]].item() for at in range(prompt_length - cut, len(ids)))


@pytest.mark.parametrize("task", COMMONSENSE_TASKS)
def test_predictions_and_accuracies_are_those_of_a_naive_loop(asked, model, tokenizer, rows, task):
    results, runs = asked
    answered = [[float(i.filtered_resps["none"][0]) for i in instances] for instances in by_question(runs[task])]
    hits: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    found = questions(task, list(rows[task].evaluated), origin=task)
    assert len(found) == len(answered) == ITEMS
    for question, theirs in zip(found, answered, strict=True):
        ours, lengths = [], []
        for context, continuation in question.pairs:
            candidate = encode_pairs(tokenizer, ((context, continuation),), 0).correct
            ours.append(log_likelihood(model, candidate.tokens.tolist(), candidate.prompt_length))
            lengths.append(len(continuation.removeprefix(" ")))
        assert theirs == pytest.approx(ours, abs=1e-3)
        hits["acc"].append(max(range(len(ours)), key=ours.__getitem__) == question.correct)
        by_length = [value / length for value, length in zip(ours, lengths, strict=True)]
        hits["acc_norm"].append(max(range(len(ours)), key=by_length.__getitem__) == question.correct)
    metrics = results[task].metrics
    kinds = ("acc", "acc_norm") if task in NORMALISED else ("acc",)
    assert set(metrics) == {f"{task}_{kind}{ending}" for kind in kinds for ending in ("", "_stderr")}
    for kind in kinds:
        share = sum(hits[kind]) / ITEMS
        assert metrics[f"{task}_{kind}"] == share
        assert metrics[f"{task}_{kind}_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (ITEMS - 1)))


def by_question(task: Any) -> list[list[Any]]:
    numbers = sorted({instance.doc_id for instance in task.instances})
    return [sorted((i for i in task.instances if i.doc_id == n), key=lambda i: i.idx) for n in numbers]


def test_prompts_are_those_of_the_calibration_items(asked, rows):
    _, runs = asked
    for task in TASKS:
        pairs = [tuple(instance.args for instance in instances) for instances in by_question(runs[task])]
        assert pairs == [question.pairs for question in questions(task, list(rows[task].evaluated), origin=task)]


def test_the_naive_loop_sees_right_and_wrong_answers(asked):
    results, _ = asked
    accuracies = [results[task].metrics[f"{task}_acc"] for task in TASKS]
    assert any(0 < accuracy < 1 for accuracy in accuracies), "all right or all wrong would not show a fault"
    differ = [
        task for task in NORMALISED if len({results[task].metrics[f"{task}_{k}"] for k in ("acc", "acc_norm")}) > 1
    ]
    assert differ, "the two accuracies must be seen to differ"


def test_the_means_give_each_task_the_same_weight(asked):
    results, _ = asked
    metrics = {name: value for task in TASKS for name, value in results[task].metrics.items()}
    plain = [f"{task}_acc" for task in COMMONSENSE_TASKS]
    normalised = [f"{task}_acc_norm" if task in NORMALISED else f"{task}_acc" for task in COMMONSENSE_TASKS]
    mean = results["commonsense_qa"]
    assert mean.protocol["mean_of"] == {"commonsense_qa_acc": plain, "commonsense_qa_acc_norm": normalised}
    for name, parts in mean.protocol["mean_of"].items():
        assert mean.metrics[name] == pytest.approx(sum(metrics[part] for part in parts) / 7)
        variance = sum(metrics[f"{part}_stderr"] ** 2 for part in parts)
        assert mean.metrics[f"{name}_stderr"] == pytest.approx(math.sqrt(variance) / 7)
    assert len(mean.metrics) == 4


def test_the_protocol_says_how(asked):
    results, _ = asked
    for task in TASKS:
        protocol = results[task].protocol
        assert protocol["harness"] == "lm-eval 0.4.13"
        assert (protocol["task"], protocol["task_version"]) == (task, 2.0 if task == "boolq" else 1.0)
        assert (protocol["shots"], protocol["fewshot_seed"], protocol["num_samples"]) == (0, None, ITEMS)
        assert (protocol["batch_size"], protocol["limit"], protocol["context"]) == (3, None, 512)
    mean = results["commonsense_qa"].protocol
    assert (mean["num_samples"], mean["shots"], mean["batch_size"]) == (7 * ITEMS, 0, 3)
    assert canonical_json({name: [result.metrics, result.protocol] for name, result in results.items()})


def test_the_limit_takes_the_first_questions_of_each_task(asked, model, tokenizer, rows, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    limited = choice_accuracy(model, tokenizer, rows=rows, section=ChoiceEvaluation(limit=2))
    alone = {task: TaskRows(part.evaluated[:2]) for task, part in rows.items()}
    again = choice_accuracy(model, tokenizer, rows=alone, section=ChoiceEvaluation())
    for task in limited:
        assert limited[task].metrics == again[task].metrics
    assert [limited[task].protocol["num_samples"] for task in TASKS] == [2] * 7
    assert not (tmp_path / "hf").exists(), "something was cached"
    assert capsys.readouterr().err == ""


def test_one_question_has_no_standard_error_and_neither_has_the_mean(model, tokenizer, rows):
    results = choice_accuracy(model, tokenizer, rows=rows, section=ChoiceEvaluation(limit=1))
    assert not [name for result in results.values() for name in result.metrics if name.endswith("_stderr")]
    assert set(results["commonsense_qa"].metrics) == {"commonsense_qa_acc", "commonsense_qa_acc_norm"}


def test_questions_longer_than_the_context_are_counted_and_said(asked, model, tokenizer, rows, caplog):
    results, _ = asked
    long = [dict(row) for row in rows["boolq"].evaluated[:3]]
    long[1]["passage"] = "Once upon a time there was a cat. " * 100
    with caplog.at_level(logging.WARNING, logger="gisp_tasks"):
        cut = choice_accuracy(model, tokenizer, rows={"boolq": TaskRows(long)}, section=ChoiceEvaluation())
    pairs = [pair for question in questions("boolq", long, origin="boolq") for pair in question.pairs]
    num_cut = sum(len(tokenizer(context + answer)["input_ids"]) > 513 for context, answer in pairs)
    assert num_cut >= 2
    assert cut["boolq"].protocol["num_cut_pairs"] == num_cut
    assert f"{num_cut} of 6 pairs of question and answer were cut from the left" in caplog.text
    assert results["piqa"].protocol["num_cut_pairs"] == 0


@pytest.mark.parametrize("task", ["hellaswag", "winogrande", "boolq"])
def test_shots_come_from_the_examples(testdata, model, tokenizer, rows, task):
    examples = read(testdata, task, "train", 4)
    given = {task: TaskRows(rows[task].evaluated, examples)}
    with kept() as tasks:
        result = choice_accuracy(model, tokenizer, rows=given, section=ChoiceEvaluation(shots=2, limit=1))[task]
    assert (result.protocol["shots"], result.protocol["fewshot_seed"]) == (2, 1234)
    solved = ["".join(question.pairs[question.correct]) for question in questions(task, examples, origin=task)]
    (own,) = questions(task, list(rows[task].evaluated[:1]), origin=task)
    for instance, (context, continuation) in zip(tasks[task].instances, own.pairs, strict=True):
        assert instance.args[1] == continuation
        *shots, last = instance.args[0].split("\n\n")
        assert last == context
        assert len(set(shots) & set(solved)) == 2


def test_fewer_examples_than_shots_are_refused(model, tokenizer, rows):
    with pytest.raises(InputError, match=r"boolq: shots=1 .* there are 0\. Lower"):
        choice_accuracy(model, tokenizer, rows={"boolq": rows["boolq"]}, section=ChoiceEvaluation(shots=1))


def test_the_split_is_a_test_split_only_where_it_has_labels():
    assert {task: evaluated_split(task, "test") for task in TASKS} == {
        "boolq": "validation",
        "arc_easy": "test",
        "arc_challenge": "test",
        "hellaswag": "validation",
        "openbookqa": "test",
        "winogrande": "validation",
        "piqa": "validation",
    }
    assert {evaluated_split(task, "validation") for task in TASKS} == {"validation"}


def test_rows_of_boolq_get_the_label_that_lm_eval_reads():
    row = {"passage": "Cats purr.", "question": "do cats purr"}
    original, superglue = {**row, "answer": True}, {**row, "label": 1, "idx": 7}
    assert harness_rows("boolq", [original, superglue], origin="rows") == [{**original, "label": 1}, superglue]
    with pytest.raises(InputError, match="rows, row 1: a labelled row of boolq was expected"):
        harness_rows("boolq", [row], origin="rows")
