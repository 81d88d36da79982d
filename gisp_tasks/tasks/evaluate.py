"""One evaluation of one checkpoint, as it lies in the store: fetched, verified, loaded, measured."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gisp_tasks.data import sources
from gisp_tasks.data.calibration import encode, encode_problem
from gisp_tasks.pruning.plan import DENSE, Keys
from gisp_tasks.recipe import ProblemEvaluation, Recipe, TextEvaluation
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores import model_source
from gisp_tasks.tasks.runtime import Json, Run, make_torch_deterministic, scratch

logger = logging.getLogger(__name__)

# Evaluation -> (data set, split that is measured, split of solved examples).
_DATASETS = {
    "wikitext2": ("wikitext2", "test", None),
    "gsm8k": ("gsm8k", "test", "train"),
    "embedded_text": ("embedded", "test", None),
    "embedded_arithmetic": ("embedded_arithmetic", "test", "train"),
}


def evaluate(recipe: Json, run: Json, level: str, evaluation: str, model: Json | None) -> Json:
    """Publish ``levels/<level>/evaluation/<evaluation>.json``: metrics, each with its protocol.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: its name, or ``dense``.
        evaluation: a key of the recipe's ``evaluation``.
        model: reference of the level's checkpoint; None for the dense model.
    """
    this = Run.open(recipe, run)
    key = Keys.level(level, f"evaluation/{evaluation}.json")
    if done := this.store.stat(key):
        return done.to_dict()
    make_torch_deterministic()
    with scratch() as directory:
        if model is None:
            assert level == DENSE, "only the dense model is not in the store"
            checkpoint = model_source.locate(this.model)
        else:
            checkpoint = this.store.fetch_directory(ArtifactRef.from_dict(model), directory / "model")
        # A level's modelling file is this package's own; base models are loaded as the recipe says.
        remote_code = model is not None or this.recipe.model.trust_remote_code
        section = getattr(this.recipe.evaluation, evaluation)
        result = measure(checkpoint, evaluation, section, dtype=this.recipe.model.dtype, trust_remote_code=remote_code)
    for name, value in result["metrics"].items():
        logger.info("%s %s: %.6g", level, name, value)
    return this.publish_json(key, result).to_dict()


def measure(
    checkpoint: Path,
    evaluation: str,
    section: TextEvaluation | ProblemEvaluation,
    *,
    dtype: str,
    trust_remote_code: bool = False,
) -> Json:
    """Metrics and protocols of one evaluation of a checkpoint directory."""
    from gisp_tasks.export.reload import load_model, load_tokenizer

    model = load_model(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    return measure_model(model, load_tokenizer(checkpoint, trust_remote_code=trust_remote_code), evaluation, section)


def measure_model(model: Any, tokenizer: Any, evaluation: str, section: TextEvaluation | ProblemEvaluation) -> Json:
    """Metrics and protocols of one evaluation of a model in memory."""
    context = int(model.config.max_position_embeddings)
    dataset, split, examples = _DATASETS[evaluation]
    source = sources.find(dataset, split)
    dtype = str(model.dtype).removeprefix("torch.")
    facts = {"source": source.describe(), "dtype": dtype, "device": str(model.device)}
    if isinstance(section, TextEvaluation):
        return _perplexities(model, tokenizer, source, context, facts, evaluation, section)
    assert examples is not None
    return _problems(model, tokenizer, source, sources.find(dataset, examples), facts, evaluation, section)


def evaluation_sources(recipe: Recipe) -> dict[str, sources.Source]:
    """Every data set file that the recipe's evaluations read.

    Raises:
        InputError: one that cannot be had.
    """
    found = {}
    for name in recipe.evaluation.tasks:
        dataset, split, examples = _DATASETS[name]
        found[name] = sources.find(dataset, split)
        if examples is not None:
            found[f"{name}:examples"] = sources.find(dataset, examples)
    return found


def windows_of(section: TextEvaluation, context: int) -> tuple[int, ...]:
    """The windows that will be measured on a model of that context."""
    from gisp_tasks.evaluation.perplexity import text_windows

    return text_windows(context, section.windows)


def _perplexities(
    model: Any, tokenizer: Any, source: sources.Source, context: int, facts: Json, name: str, section: TextEvaluation
) -> Json:
    import torch

    from gisp_tasks.evaluation.perplexity import token_perplexity

    token_ids = torch.from_numpy(encode(tokenizer, source.text())[: section.limit_tokens])
    metrics, protocol = {}, {}
    for window in windows_of(section, context):
        result = token_perplexity(model, token_ids, window=window)
        metric = f"{name}_ppl_token_w{window}"
        metrics[metric] = result.ppl
        protocol[metric] = {**facts, **asdict(result), "limit_tokens": section.limit_tokens, "overlap": 0}
    return {"metrics": metrics, "protocol": protocol}


def _problems(
    model: Any,
    tokenizer: Any,
    source: sources.Source,
    examples: sources.Source,
    facts: Json,
    name: str,
    section: ProblemEvaluation,
) -> Json:
    from gisp_tasks.evaluation.harness import ProblemFiles, exact_match
    from gisp_tasks.evaluation.perplexity import solution_perplexity

    items = source.items()[: section.limit_solutions]
    encoded = [encode_problem(tokenizer, question, answer) for question, answer in items]
    solutions = solution_perplexity(
        model, [ids.tolist() for ids, _ in encoded], prompt_lengths=[length for _, length in encoded]
    )
    with scratch() as directory:
        files = ProblemFiles(
            train=examples.write_jsonl(directory / "train.jsonl"), test=source.write_jsonl(directory / "test.jsonl")
        )
        matches = exact_match(model, tokenizer, files=files, section=section, name=name)
    metric = f"{name}_solution_ppl_token"
    protocol = {name: {**facts, **matches.protocol} for name in matches.metrics}
    protocol[metric] = {**facts, **asdict(solutions), "num_solutions": len(items)}
    return {"metrics": {**matches.metrics, metric: solutions.ppl}, "protocol": protocol}
