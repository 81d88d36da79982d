"""Exact match through lm-eval: offline, repeatable, and really scored."""

import logging
import os
import socket

import pyarrow.parquet
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_tasks.errors import InputError
from gisp_tasks.evaluation.harness import TaskRows
from gisp_tasks.evaluation.word_problems import exact_match
from gisp_tasks.recipe import ProblemEvaluation
from gisp_tasks.refs import canonical_json


@pytest.fixture(scope="module")
def model(testdata):
    return AutoModelForCausalLM.from_pretrained(testdata / "models/stories260K", dtype=torch.float32)


@pytest.fixture
def tokenizer(testdata):
    return AutoTokenizer.from_pretrained(testdata / "models/stories260K")


@pytest.fixture
def gsm8k(testdata):
    test, train = (pyarrow.parquet.read_table(testdata / f"data/gsm8k/{split}.parquet") for split in ("test", "train"))
    return TaskRows(test.to_pylist(), train.to_pylist())


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was tried: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def section(**values):
    return ProblemEvaluation(**({"shots": 1, "limit": 2, "max_new_tokens": 8} | values))


def problems(count):
    return [
        {"question": f"Tom has {i} cats and gets 2 more. How many?", "answer": f"It is {i}+2.\n#### {i + 2}"}
        for i in range(count)
    ]


@pytest.fixture
def small():
    return TaskRows(problems(3), problems(9)[4:])


def answering(monkeypatch, answer):
    """Let the model answer each prompt by ``answer(question)``; returns (prompt, decoding, batch size) of each."""
    seen = []

    def generate_until(self, requests, disable_tqdm=False):
        seen.extend((*request.args, self.batch_size) for request in requests)
        last = [request.args[0].rpartition("Question: ")[2].removesuffix("\nAnswer:") for request in requests]
        return [answer(question) for question in last]

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    return seen


def test_two_runs_are_equal_and_say_how(model, tokenizer, gsm8k, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    environment = dict(os.environ)
    first = exact_match(model, tokenizer, rows=gsm8k, section=section())
    assert exact_match(model, tokenizer, rows=gsm8k, section=section()) == first
    assert set(first.metrics) == {
        "gsm8k_exact_match_strict",
        "gsm8k_exact_match_strict_stderr",
        "gsm8k_exact_match_flexible",
        "gsm8k_exact_match_flexible_stderr",
    }
    assert first.protocol["harness"] == "lm-eval 0.4.13"
    assert first.protocol["task"] == "gsm8k"
    assert first.protocol["task_version"] == 3.0
    assert first.protocol["shots"] == 1
    assert first.protocol["num_samples"] == first.protocol["limit"] == 2
    assert first.protocol["batch_size"] == 8
    assert first.protocol["max_new_tokens"] == 8
    assert first.protocol["fewshot_seed"] == 1234
    assert canonical_json({"metrics": first.metrics, "protocol": first.protocol})
    assert dict(os.environ) == environment
    assert not (tmp_path / "hf").exists(), "something was cached"


@pytest.mark.parametrize(
    ("form", "strict", "flexible"),
    [
        ("#### {number}", 1.0, 1.0),
        ("The answer is {number}.", 0.0, 1.0),
        ("#### {number}1", 0.0, 0.0),
        ("no idea", 0.0, 0.0),
    ],
)
def test_answers_are_scored(model, tokenizer, gsm8k, monkeypatch, form, strict, flexible):
    answers = {row["question"]: row["answer"] for row in gsm8k.evaluated}
    answering(monkeypatch, lambda question: form.format(number=answers[question].rpartition("#### ")[2]))
    metrics = exact_match(model, tokenizer, rows=gsm8k, section=section(limit=5)).metrics
    assert metrics["gsm8k_exact_match_strict"] == strict
    assert metrics["gsm8k_exact_match_flexible"] == flexible


def test_half_right_is_half(model, tokenizer, monkeypatch, small):
    answering(monkeypatch, lambda question: "#### 2" if "has 0 cats" in question else "#### 999")
    metrics = exact_match(model, tokenizer, rows=small, section=section(limit=2), name="cats").metrics
    assert metrics["cats_exact_match_strict"] == 0.5
    # Standard deviation of (1, 0) with one degree of freedom less, over the root of two.
    assert metrics["cats_exact_match_strict_stderr"] == pytest.approx(0.5)


def test_the_recipe_reaches_the_prompts_and_the_decoding(model, tokenizer, monkeypatch, small):
    seen = answering(monkeypatch, lambda question: "")
    exact_match(
        model,
        tokenizer,
        rows=small,
        section=section(shots=3, limit=None, max_new_tokens=17, batch_size=5),
        name="cats",
    )
    shots = {row["question"] for row in problems(9)[4:]}
    tested = [row["question"] for row in problems(3)]
    for (prompt, decoding, batch_size), question in zip(seen, tested, strict=True):
        *examples, last = prompt.split("Question: ")[1:]
        assert last == f"{question}\nAnswer:"
        assert len({example.partition("\n")[0] for example in examples} & shots) == 3
        assert all("####" in example for example in examples)
        assert batch_size == 5
        assert decoding["max_gen_toks"] == 17
        assert decoding["do_sample"] is False
        assert "Question:" in decoding["until"]


def test_examples_differ_between_problems_and_not_between_runs(model, tokenizer, gsm8k, monkeypatch):
    seen = answering(monkeypatch, lambda question: "")
    for _ in range(2):
        exact_match(model, tokenizer, rows=gsm8k, section=section(shots=2, limit=3))
    prompts = [prompt for prompt, *_ in seen]
    assert prompts[:3] == prompts[3:]
    assert len({prompt.partition("\n")[0] for prompt in prompts[:3]}) == 3


def test_a_limit_beyond_the_problems_takes_all(model, tokenizer, small):
    protocol = exact_match(model, tokenizer, rows=small, section=section(limit=100), name="cats").protocol
    assert (protocol["limit"], protocol["num_samples"], protocol["task"]) == (100, 3, "gsm8k")


def test_other_rows_are_not_taken_for_those_of_an_earlier_run(model, tokenizer, monkeypatch, small):
    answering(monkeypatch, lambda question: "#### 2")
    before = exact_match(model, tokenizer, rows=small, section=section(limit=1), name="cats")
    later = TaskRows(small.evaluated[1:], small.examples)
    after = exact_match(model, tokenizer, rows=later, section=section(limit=1), name="cats")
    assert (before.metrics["cats_exact_match_strict"], after.metrics["cats_exact_match_strict"]) == (1.0, 0.0)


def test_one_problem_has_no_standard_error(model, tokenizer, small):
    metrics = exact_match(model, tokenizer, rows=small, section=section(limit=1, shots=0), name="cats").metrics
    assert set(metrics) == {"cats_exact_match_strict", "cats_exact_match_flexible"}


def test_the_callers_tokenizer_and_logging_stay_as_they_are(model, tokenizer, small, capsys, caplog):
    padding_side = tokenizer.padding_side
    logging.getLogger("lm_eval").setLevel(logging.INFO)
    try:
        with caplog.at_level(logging.INFO):
            exact_match(model, tokenizer, rows=small, section=section(), name="cats")
        assert logging.getLogger("lm_eval").level == logging.INFO
    finally:
        logging.getLogger("lm_eval").setLevel(logging.NOTSET)
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == padding_side
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    assert capsys.readouterr().err == ""


def test_prompts_that_do_not_fit_are_cut_counted_and_said(model, tokenizer, small, caplog):
    with caplog.at_level(logging.WARNING, logger="gisp_tasks"):
        fitting = exact_match(model, tokenizer, rows=small, section=section(), name="cats")
        assert fitting.protocol["num_cut_prompts"] == 0
        assert not caplog.records
        cut = exact_match(model, tokenizer, rows=small, section=section(max_new_tokens=480), name="cats")
    assert cut.protocol["num_cut_prompts"] == 2
    assert cut.protocol["context"] == 512
    assert "2 of 2 prompts were cut from the left" in caplog.text


def test_an_answer_longer_than_the_context_is_refused(model, tokenizer, small):
    with pytest.raises(InputError, match=r"max_new_tokens=512 .*context has 512 tokens"):
        exact_match(model, tokenizer, rows=small, section=section(max_new_tokens=512), name="cats")


def test_more_shots_than_examples_are_refused(model, tokenizer, small):
    with pytest.raises(InputError, match=r"shots=6 .* there are 5\. Lower"):
        exact_match(model, tokenizer, rows=small, section=section(shots=6), name="cats")


def test_no_problem_at_all_is_refused(model, tokenizer, small):
    with pytest.raises(InputError, match="no rows were found"):
        exact_match(model, tokenizer, rows=TaskRows([], small.examples), section=section(), name="cats")


def test_without_shots_no_examples_are_needed(model, tokenizer, small, monkeypatch):
    seen = answering(monkeypatch, lambda question: "")
    protocol = exact_match(model, tokenizer, rows=TaskRows(small.evaluated), section=section(shots=0)).protocol
    assert [prompt for prompt, *_ in seen] == [f"Question: {row['question']}\nAnswer:" for row in problems(2)]
    assert (protocol["shots"], protocol["fewshot_seed"]) == (0, None)
