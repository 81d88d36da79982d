"""Prompts, answers and token ids of the seven multiple-choice tasks against lm-eval's own."""

from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pyarrow.parquet
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_tasks.data.items import encode_pairs
from gisp_tasks.data.multiple_choice import TASKS, questions
from gisp_tasks.errors import InputError
from gisp_tasks.recipe import COMMONSENSE_TASKS

CONFIGS = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
# Every file of the kit whose rows have labels, and enough rows to meet 3 and 5 choices and labels 1 to 4.
FILES = [
    *(("boolq", "train"), ("boolq", "validation"), ("piqa", "train_surrogate"), ("hellaswag", "train")),
    *(("hellaswag", "validation"), ("winogrande", "train"), ("arc_easy", "train"), ("arc_challenge", "train")),
    ("openbookqa", "train"),
]
ROWS = 300


@pytest.fixture(scope="module")
def lm(testdata: Path) -> HFLM:
    path = testdata / "models/stories260K"
    return HFLM(pretrained=AutoModelForCausalLM.from_pretrained(path), tokenizer=AutoTokenizer.from_pretrained(path))


def read(testdata: Path, task: str, split: str) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(testdata / f"data/{task}/{split}.parquet").to_pylist()[:ROWS]


def lm_eval_requests(task: str, rows: list[dict[str, Any]]) -> tuple[list[list[tuple[str, str]]], list[int]]:
    """(context, continuation) of every candidate, and the index of the right one, by row."""
    if task == "boolq":  # lm-eval reads SuperGLUE's form
        rows = [{**row, "label": int(row["answer"])} for row in rows]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / CONFIGS[task])
    for key in ("tag", "dataset_path", "dataset_name", "training_split", "test_split"):
        config.pop(key, None)
    splits = datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)})
    loaded = TaskManager(include_defaults=False).load([config | {"custom_dataset": lambda **_: splits}])
    made = loaded["tasks"][task]
    documents = list(made.validation_docs())
    requests = [
        made.construct_requests(document, made.fewshot_context(document, num_fewshot=0)) for document in documents
    ]
    labels = [made.doc_to_text(d) if task == "winogrande" else made.doc_to_target(d) for d in documents]
    return [[request.args for request in one] for one in requests], [int(label) for label in labels]


@pytest.mark.parametrize(("task", "split"), FILES, ids=lambda value: value)
def test_token_ids_are_those_of_lm_eval(testdata, lm, task, split):
    rows = read(testdata, task, split)
    requests, labels = lm_eval_requests(task, rows)
    found = questions(task, rows, origin="rows")
    assert [question.correct for question in found] == labels
    assert len(set(labels)) > 1, "rows with one label only would not show a fault"
    for question, expected in zip(found, requests, strict=True):
        assert list(question.pairs) == expected
        item = encode_pairs(lm.tokenizer, question.pairs, question.correct)
        pairs = [(c.tokens[: c.prompt_length].tolist(), c.tokens[c.prompt_length :].tolist()) for c in item.candidates]
        wanted = [lm._encode_pair(context, continuation) for context, continuation in expected]
        assert pairs[0] == wanted.pop(question.correct)
        assert pairs[1:] == wanted


def test_the_seven_tasks_in_the_published_order():
    published = ["boolq", "arc_easy", "arc_challenge", "hellaswag", "openbookqa", "winogrande", "piqa"]
    assert list(TASKS) == list(COMMONSENSE_TASKS) == published
    assert TASKS.keys() == CONFIGS.keys()


@pytest.mark.parametrize(("label", "correct"), [("1", 0), ("2", 1)])
def test_the_answer_of_winogrande_is_that_of_its_label(label, correct):
    row = {"sentence": "Ann thanked _ for it.", "option1": "Bea", "option2": "Cat", "answer": label}
    (question,) = questions("winogrande", [row], origin="rows")
    assert question.pairs == (("Ann thanked Bea", " for it."), ("Ann thanked Cat", " for it."))
    assert question.correct == correct


@pytest.mark.parametrize(
    ("text", "continuation"),
    [("Once upon  ", "a time"), ("<s>Once", " upon"), ("Once", "upon"), ("Once upon a ti", "me there")],
)
def test_edges_of_prompt_and_answer_as_in_lm_eval(lm, text, continuation):
    item = encode_pairs(lm.tokenizer, ((text, continuation), (text, " x")), 0)
    prompt, answer = lm._encode_pair(text, continuation)
    assert item.correct.tokens.tolist() == prompt + answer
    assert item.correct.prompt_length == len(prompt)


@pytest.mark.parametrize(
    ("task", "row", "found"),
    [
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "label -1 for 2 choices"),
        ("piqa", {"goal": "g", "sol1": "a", "label": 0}, "KeyError: 'sol2'"),
        ("hellaswag", {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d"], "label": ""}, "ValueError"),
        ("winogrande", {"sentence": "No gap", "option1": "a", "option2": "b", "answer": "1"}, "no gap"),
        ("winogrande", {"sentence": "A _", "option1": "a", "option2": "b", "answer": ""}, "ValueError"),
        ("arc_easy", {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}, "for 1 choices"),
    ],
)
def test_rows_without_labels_or_columns_are_refused(task, row, found):
    good = {"boolq": {}, "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}}.get(task)
    rows = [good, row] if good else [row]
    with pytest.raises(InputError) as raised:
        questions(task, rows, origin="some/file.parquet")
    assert f"some/file.parquet, row {len(rows)}: a labelled row of {task} was expected" in str(raised.value)
    assert found in str(raised.value)
