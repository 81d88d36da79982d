"""Exact match on word problems in GSM8K's schema, by lm-eval's own task ``gsm8k``."""

import logging
from typing import Any

from gisp_tasks.errors import InputError
from gisp_tasks.evaluation.harness import HarnessResult, TaskRows, language_model, num_longer, run_task
from gisp_tasks.recipe import ProblemEvaluation

logger = logging.getLogger(__name__)

_METRIC_OF_FILTER = {"strict-match": "exact_match_strict", "flexible-extract": "exact_match_flexible"}


def exact_match(
    model: Any, tokenizer: Any, *, rows: TaskRows, section: ProblemEvaluation, name: str = "gsm8k"
) -> HarnessResult:
    """Let the model solve the problems by greedy decoding and count the right answers.

    A prompt that leaves no room for the answer in the model's context is cut from the left, as lm-eval does:
    the first solved examples go. The number of such prompts is recorded and logged.

    Args:
        model: a causal language model of transformers; it is put into evaluation mode.
        tokenizer: its tokenizer; not changed.
        rows: the texts ``question`` and ``answer``, which ends in ``#### number``.
        section: shots, limit, batch size and longest answer.
        name: prefix of the metrics.

    Returns:
        ``<name>_exact_match_strict`` and ``_flexible``, with their standard errors.

    Raises:
        InputError: too few rows, or the longest answer does not fit into the model's context.
    """
    lm = language_model(model, tokenizer, batch_size=section.batch_size)
    _check_answer_fits(lm.max_length, section.max_new_tokens)
    run = run_task(
        lm,
        "gsm8k/gsm8k.yaml",
        rows=TaskRows(rows.evaluated[: section.limit], rows.examples),
        shots=section.shots,
        generation={"max_gen_toks": section.max_new_tokens},
    )
    metrics: dict[str, float] = {}
    for filter_name, metric in _METRIC_OF_FILTER.items():
        metrics |= run.metric(f"exact_match,{filter_name}", f"{name}_{metric}")
    protocol = {
        **run.protocol,
        "limit": section.limit,
        "batch_size": section.batch_size,
        "max_new_tokens": section.max_new_tokens,
        "context": lm.max_length,
        "num_cut_prompts": _num_cut_prompts(lm, run.task, section, name),
        "filters": {metric: filter_name for filter_name, metric in _METRIC_OF_FILTER.items()},
        "generation": {key: run.task.config.generation_kwargs[key] for key in ("do_sample", "until")},
    }
    return HarnessResult(metrics, protocol)


def _check_answer_fits(context: int, max_new_tokens: int) -> None:
    if max_new_tokens >= context:
        raise InputError(
            f"max_new_tokens={max_new_tokens} was asked for, and the model's context has {context} tokens, which "
            f"hold the question too. Lower max_new_tokens well below {context}"
        )


def _num_cut_prompts(lm: Any, task: Any, section: ProblemEvaluation, name: str) -> int:
    """How many prompts lm-eval had to cut; said aloud when there are any."""
    prompts = [instance.args[0] for instance in task.instances]
    num_cut = num_longer(lm, prompts, room=lm.max_length - section.max_new_tokens)
    if num_cut:
        logger.warning(
            "%s: %d of %d prompts were cut from the left: the model's context of %d tokens has no room for "
            "%d shots, the question and an answer of %d tokens",
            name,
            num_cut,
            len(prompts),
            lm.max_length,
            section.shots,
            section.max_new_tokens,
        )
    return num_cut
