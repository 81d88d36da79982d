"""Perplexity against loops that predict one token at a time in float64."""

import logging
import math

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.evaluation.perplexity import solution_perplexity, text_windows, token_perplexity


@pytest.fixture(scope="module")
def load(testdata):
    """A fresh model of its own, for tests that change it."""
    return lambda dtype=torch.float32: AutoModelForCausalLM.from_pretrained(
        testdata / "models/stories260K", dtype=dtype
    )


@pytest.fixture(scope="module")
def model(load):
    return load()


@pytest.fixture(scope="module")
def tokenizer(testdata):
    return AutoTokenizer.from_pretrained(testdata / "models/stories260K")


@pytest.fixture(scope="module")
def wikitext(testdata, tokenizer):
    rows = pyarrow.parquet.read_table(testdata / "data/wikitext2/test_first_half.parquet")["text"].to_pylist()
    return torch.tensor(tokenizer("\n\n".join(rows[:12]))["input_ids"][:500])


@pytest.fixture(scope="module")
def solved(testdata, tokenizer):
    """Nine questions with solutions, of different lengths: (sequences, prompt lengths)."""
    rows = pyarrow.parquet.read_table(testdata / "data/gsm8k/test.parquet").slice(0, 9).to_pylist()
    questions = [tokenizer(row["question"][:80])["input_ids"] for row in rows]
    solutions = [tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in rows]
    sequences = [q + s[: 20 + 7 * i] for i, (q, s) in enumerate(zip(questions, solutions, strict=True))]
    return sequences, [len(question) for question in questions]


def naive_losses(model, ids, first_target):
    """The losses of the tokens from ``first_target`` on, each by its own forward pass over its own prefix."""
    losses = []
    for position in range(first_target, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:position]])).logits[0, -1].double()
        losses.append(float(torch.logsumexp(logits, 0) - logits[ids[position]]))
    return losses


def test_it_equals_a_naive_loop(model, wikitext):
    result = token_perplexity(model, wikitext[:200], window=48)
    # 200 tokens are four windows of 48; the last 8 are left out.
    windows = [wikitext[start : start + 48].tolist() for start in (0, 48, 96, 144)]
    losses = [loss for window in windows for loss in naive_losses(model, window, 1)]
    assert len(losses) == 4 * 47
    assert result.mean_nll == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-6)
    assert (result.num_targets, result.num_windows, result.window) == (4 * 47, 4, 48)


@pytest.mark.parametrize("batch_tokens", [1, 64, 150, 10_000])
def test_it_does_not_depend_on_the_batch(model, wikitext, batch_tokens):
    expected = token_perplexity(model, wikitext, window=64, batch_tokens=128)
    found = token_perplexity(model, wikitext, window=64, batch_tokens=batch_tokens)
    assert found.mean_nll == pytest.approx(expected.mean_nll, rel=1e-6)
    assert (found.num_targets, found.num_windows) == (expected.num_targets, expected.num_windows)


def test_it_is_repeatable_to_the_bit(model, wikitext):
    assert token_perplexity(model, wikitext, window=64) == token_perplexity(model, wikitext, window=64)


def test_the_tail_is_not_used(model, wikitext):
    changed = wikitext[:130].clone()
    changed[128:] = 5
    assert token_perplexity(model, changed, window=64) == token_perplexity(model, wikitext[:128], window=64)


def test_long_windows_are_widened_piece_by_piece(model, wikitext, monkeypatch):
    whole = token_perplexity(model, wikitext, window=250)
    monkeypatch.setattr("gisp_tasks.evaluation.perplexity._ROWS_AT_ONCE", 37)
    assert token_perplexity(model, wikitext, window=250).mean_nll == pytest.approx(whole.mean_nll, rel=1e-6)


def test_dropout_is_off_even_if_the_model_was_training(load, wikitext):
    model = load()
    expected = token_perplexity(model, wikitext, window=64)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert token_perplexity(model, wikitext, window=64) == expected


def test_half_precision_logits_are_widened_before_the_loss(load, wikitext):
    """A loss computed in bfloat16 has three digits; from widened logits it is that of the model itself."""
    model = load(torch.bfloat16)
    ids = wikitext[:64]
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    exact = float((logits.logsumexp(1) - logits.gather(1, ids[1:, None])[:, 0]).mean())
    assert token_perplexity(model, ids, window=64).mean_nll == pytest.approx(exact, rel=1e-6)


def test_a_text_shorter_than_a_window_is_refused(model, wikitext):
    with pytest.raises(InputError, match=r"window=64: the text has 63 tokens"):
        token_perplexity(model, wikitext[:63], window=64)


def test_a_window_without_a_target_is_refused(model, wikitext):
    with pytest.raises(InputError, match=r"window=1: .*at least 2"):
        token_perplexity(model, wikitext, window=1)


def test_a_loss_that_is_not_finite_is_an_error(load, wikitext):
    model = load()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(NumericsError, match="not finite"):
        token_perplexity(model, wikitext, window=64)


def test_a_perplexity_beyond_the_numbers_is_an_error(load, wikitext):
    model = load()
    with torch.no_grad():
        model.model.norm.weight *= 1e4
    with pytest.raises(NumericsError, match="not a finite number"):
        token_perplexity(model, wikitext, window=64)


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_solutions_equal_a_naive_loop(model, solved, batch_tokens):
    sequences, prompt_lengths = solved
    assert len({len(sequence) for sequence in sequences}) > 5, "padding is not put to the test"
    losses = [
        loss for ids, prompt in zip(sequences, prompt_lengths, strict=True) for loss in naive_losses(model, ids, prompt)
    ]
    result = solution_perplexity(model, sequences, prompt_lengths=prompt_lengths, batch_tokens=batch_tokens)
    assert result.mean_nll == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert (result.num_targets, result.num_windows, result.window) == (len(losses), len(sequences), None)


def test_without_a_question_the_first_token_is_given(model, wikitext):
    whole = token_perplexity(model, wikitext[:64], window=64)
    as_solution = solution_perplexity(model, [wikitext[:64].tolist()], prompt_lengths=[0])
    assert as_solution.mean_nll == whole.mean_nll
    assert as_solution.num_targets == 63


def test_a_solution_of_no_tokens_is_refused(model):
    with pytest.raises(InputError, match=r"sequence 1 has 3 tokens of which 3 are its question"):
        solution_perplexity(model, [[1, 2, 3], [1, 2, 3]], prompt_lengths=[2, 3])


def test_a_sequence_beyond_the_context_is_left_out_and_said(model, caplog):
    context = model.config.max_position_embeddings
    fits, too_long = [1, 30, 40, 50], [1] + [60] * context
    with caplog.at_level(logging.WARNING, logger="gisp_tasks"):
        result = solution_perplexity(model, [fits, too_long], prompt_lengths=[1, 1])
    assert result == solution_perplexity(model, [fits], prompt_lengths=[1])
    assert f"1 of 2 sequences are longer than the model's context of {context} tokens" in caplog.text
    with pytest.raises(InputError, match="none of 1 sequences fits"):
        solution_perplexity(model, [too_long], prompt_lengths=[1])


def test_windows_never_exceed_the_context_nor_repeat():
    assert text_windows(512, (128, 2048)) == (128, 512)
    assert text_windows(512, (512, 2048, 4096, 128)) == (512, 128)
    assert text_windows(4096, (2048, 128)) == (2048, 128)
