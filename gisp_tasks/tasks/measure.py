"""What the recipe's evaluations read, and the metrics that they find on a checkpoint, each with its protocol."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gisp_tasks.data import sources
from gisp_tasks.data.calibration import encode, encode_problem
from gisp_tasks.data.multiple_choice import TASKS, evaluated_split, harness_rows
from gisp_tasks.data.sources import Source
from gisp_tasks.recipe import ChoiceEvaluation, ProblemEvaluation, Recipe, SpeedEvaluation, TextEvaluation
from gisp_tasks.tasks.runtime import Json

Section = TextEvaluation | ProblemEvaluation | ChoiceEvaluation

# Evaluation -> (data set, split that is measured).
_DATASETS = {
    "wikitext2": ("wikitext2", "test"),
    "gsm8k": ("gsm8k", "test"),
    "embedded_text": ("embedded", "test"),
    "embedded_arithmetic": ("embedded_arithmetic", "test"),
}


def evaluation_sources(recipe: Recipe) -> dict[str, Source]:
    """Every data set file that the recipe's evaluations read.

    Raises:
        InputError: one that cannot be had.
    """
    found: dict[str, Source] = {}
    for name in recipe.evaluation.tasks:
        section = getattr(recipe.evaluation, name)
        if not isinstance(section, SpeedEvaluation):
            found |= _find(name, section)
    return found


def measure(
    checkpoint: Path, evaluation: str, section: Section, *, dtype: str, trust_remote_code: bool = False
) -> Json:
    """Metrics and protocols of one evaluation of a checkpoint directory.

    Args:
        checkpoint: a Hugging Face directory.
        evaluation: a key of the recipe's ``evaluation``.
        section: its value.
        dtype: type to hold the weights in.
        trust_remote_code: run code that the checkpoint carries.

    Returns:
        ``metrics``: name -> value; ``protocol``: name -> everything that the value depends on besides the weights.

    Raises:
        InputError: data that cannot be had or read, or that does not fit the model.
    """
    from gisp_tasks.export.reload import load_model, load_tokenizer

    model = load_model(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    return measure_model(model, tokenizer, evaluation, section)


def measure_model(model: Any, tokenizer: Any, evaluation: str, section: Section) -> Json:
    """`measure` of a model in memory."""
    found = _find(evaluation, section)
    if isinstance(section, TextEvaluation):
        windows = windows_of(section, int(model.config.max_position_embeddings))
        result = _perplexities(model, tokenizer, found[evaluation], evaluation, section, windows)
    elif isinstance(section, ProblemEvaluation):
        result = _problems(model, tokenizer, found, evaluation, section)
    else:
        result = _choices(model, tokenizer, found, section)
    protocol = {name: {**placed(model), **part} for name, part in result["protocol"].items()}
    return {"metrics": result["metrics"], "protocol": protocol}


def placed(model: Any) -> Json:
    """What a protocol says of a model in memory."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}


def windows_of(section: TextEvaluation, context: int) -> tuple[int, ...]:
    """The windows that will be measured on a model of that context."""
    from gisp_tasks.evaluation.perplexity import text_windows

    return text_windows(context, section.windows)


def _find(evaluation: str, section: Section) -> dict[str, Source]:
    """Where an evaluation's rows come from, by its name (or those of its tasks), and those of its solved examples."""
    if isinstance(section, ChoiceEvaluation):
        wanted = {task: (task, evaluated_split(task, section.split)) for task in TASKS}
    else:
        wanted = {evaluation: _DATASETS[evaluation]}
    if not isinstance(section, TextEvaluation) and section.shots:
        wanted |= {_examples(name): (dataset, "train") for name, (dataset, _) in wanted.items()}
    return {name: sources.find(dataset, split) for name, (dataset, split) in wanted.items()}


def _examples(name: str) -> str:
    return f"{name}:examples"


def _data(found: Mapping[str, Source], name: str) -> Json:
    """What a protocol says of its data."""
    examples = found.get(_examples(name))
    return {"source": found[name].describe(), **({"examples": examples.describe()} if examples else {})}


def _perplexities(
    model: Any, tokenizer: Any, source: Source, name: str, section: TextEvaluation, windows: tuple[int, ...]
) -> Json:
    import torch

    from gisp_tasks.evaluation.perplexity import token_perplexity

    token_ids = torch.from_numpy(encode(tokenizer, source.text())[: section.limit_tokens])
    facts = {"source": source.describe(), "limit_tokens": section.limit_tokens, "overlap": 0}
    metrics, protocol = {}, {}
    for window in windows:
        result = token_perplexity(model, token_ids, window=window)
        metric = f"{name}_ppl_token_w{window}"
        metrics[metric] = result.ppl
        protocol[metric] = {**facts, **asdict(result)}
    return {"metrics": metrics, "protocol": protocol}


def _problems(model: Any, tokenizer: Any, found: Mapping[str, Source], name: str, section: ProblemEvaluation) -> Json:
    from gisp_tasks.evaluation.harness import TaskRows
    from gisp_tasks.evaluation.perplexity import solution_perplexity
    from gisp_tasks.evaluation.word_problems import exact_match

    def rows(key: str) -> list[Json]:
        return [{"question": q, "answer": a} for q, a in found[key].items()] if key in found else []

    problems = rows(name)
    items = problems[: section.limit_solutions]
    encoded = [encode_problem(tokenizer, item["question"], item["answer"]) for item in items]
    solutions = solution_perplexity(
        model, [ids.tolist() for ids, _ in encoded], prompt_lengths=[length for _, length in encoded]
    )
    facts = _data(found, name)
    metric = f"{name}_solution_ppl_token"
    metrics = {metric: solutions.ppl}
    protocol = {metric: {"source": facts["source"], **asdict(solutions), "num_solutions": len(items)}}
    if section.limit != 0:
        solved = TaskRows(problems, rows(_examples(name)))
        matches = exact_match(model, tokenizer, rows=solved, section=section, name=name)
        metrics |= matches.metrics
        protocol |= {name: {**facts, **matches.protocol} for name in matches.metrics}
    return {"metrics": metrics, "protocol": protocol}


def _choices(model: Any, tokenizer: Any, found: Mapping[str, Source], section: ChoiceEvaluation) -> Json:
    from gisp_tasks.evaluation.commonsense_qa import NAME, choice_accuracy
    from gisp_tasks.evaluation.harness import TaskRows

    def rows(task: str, key: str) -> list[Json]:
        return harness_rows(task, found[key].rows(), origin=found[key].files[0].name) if key in found else []

    results = choice_accuracy(
        model,
        tokenizer,
        rows={task: TaskRows(rows(task, task), rows(task, _examples(task))) for task in TASKS},
        section=section,
    )
    measured = {task: found[task] for task in TASKS}
    facts = {task: _data(found, task) for task in TASKS}
    facts[NAME] = {"source": sources.describe_together(NAME, measured, section.split)}
    metrics: dict[str, float] = {}
    protocol: Json = {}
    for name, result in results.items():
        metrics |= result.metrics
        protocol |= {metric: {**facts[name], **result.protocol} for metric in result.metrics}
    return {"metrics": metrics, "protocol": protocol}
