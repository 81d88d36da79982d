"""First task of a run: everything that can be wrong with the input is found here, before the first byte is written."""

import logging
from dataclasses import replace
from pathlib import Path

from gisp_tasks import __version__
from gisp_tasks.data import calibration as calibration_data
from gisp_tasks.data import contamination
from gisp_tasks.data.evaluated import evaluated_texts
from gisp_tasks.errors import InputError, NumericsError
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.plan import Keys, Plan, make_plan
from gisp_tasks.pruning.ranking import limits_of
from gisp_tasks.pruning.structures import KeepSets
from gisp_tasks.recipe import CalibrationSection, Recipe
from gisp_tasks.refs import canonical_json, sha256_bytes
from gisp_tasks.stores import model_source, signatures
from gisp_tasks.stores.artifacts import open_store
from gisp_tasks.stores.registry import MlflowRegistry
from gisp_tasks.tasks.measure import evaluation_sources
from gisp_tasks.tasks.runtime import Json
from gisp_tasks.tasks.services import check_services

logger = logging.getLogger(__name__)


def resolve_model(recipe: Json, revision: str | None = None, resume: bool = False) -> Json:
    """Check the whole input, pin the model, and publish recipe, model record and plan.

    What is digested, published and shown from here on is the recipe with the revision that was pinned, whether it
    named that one, a branch of it or none: the same weights give the same run.

    Args:
        recipe: as data.
        revision: instead of the recipe's own (given by the release watch, or by hand).
        resume: go on with a run that was begun, never begin one.

    Returns:
        Reference of ``plan.json``, by which every later task finds the run.

    Raises:
        InputError: anything of the input cannot be used; nothing was written.
        RetryableError: a server does not answer.
    """
    parsed = Recipe.parse(recipe)
    if revision is not None:
        parsed = parsed.with_revision(revision)
    check_services(parsed)
    if parsed.publish.signing is not None:
        signatures.check_key(parsed.publish.signing)
    model = model_source.resolve(parsed.model)
    parsed = parsed.with_revision(model_source.pinned_revision(model))
    plan = make_plan(parsed, geometry_of(model["config"], granularity=parsed.importance.granularity))
    directory = model_source.locate(model)
    calibration = build_calibration(parsed, parsed.calibration, directory, model)
    compensation = _compensation_data(parsed, directory, model, calibration)
    datasets = {name: source.describe() for name, source in evaluation_sources(parsed).items()}
    _check_loss(parsed, plan, directory, calibration.set)
    if parsed.export.gguf != "none":
        from gisp_tasks.export.gguf import require_supported

        require_supported(model["config"], directory)

    identity: Json = {
        "recipe": parsed.identity(),
        "model": {"revision": model["revision"], "files": model["files"]},
        "datasets": {
            "calibration": calibration.description["source"],
            "compensation": compensation.description["source"] if compensation else None,
            "evaluation": datasets,
        },
        "package_version": __version__,
    }
    run_id = sha256_bytes(canonical_json(identity))[:12]
    store = open_store(f"{parsed.publish.store}/runs/{run_id}", encryption=parsed.publish.encryption)
    if resume and store.stat(Keys.PLAN) is None:
        raise InputError(
            f"--resume was given, but {parsed.publish.store} holds no run {run_id}, which is what this recipe, model "
            f"and data come to; run without --resume to begin it"
        )
    store.put_bytes(Keys.RECIPE, recipe_yaml(parsed))
    store.put_bytes(Keys.MODEL, canonical_json(model))
    document = {"run_id": run_id, "model": model, "identity": identity, "plan": plan.to_dict()}
    ref = store.put_bytes(Keys.PLAN, canonical_json(document))
    if parsed.publish.mlflow is not None:
        MlflowRegistry(parsed.publish.mlflow.tracking_uri).open_run(
            experiment=parsed.name, run_id=run_id, parameters=parsed.identity(), datasets=_lineage(identity["datasets"])
        )
    logger.info("Run %s of %s: %d steps to %s", run_id, parsed.name, len(plan.steps), ", ".join(parsed.level_names))
    return ref.to_dict()


def _lineage(datasets: Json) -> list[dict[str, str]]:
    """The data sets of a run, as the tracking server keeps them."""
    used = [(name, datasets[name]) for name in ("calibration", "compensation") if datasets[name]]
    used += [("evaluation", source) for source in datasets["evaluation"].values()]
    return [
        {
            "name": f"{source['dataset']}/{source['split']}",
            "source": f"{source['origin']}:{source['dataset']}@{source['revision'] or 'local'}",
            "digest": source["digest"],
            "context": context,
        }
        for context, source in used
    ]


def build_calibration(
    recipe: Recipe, section: CalibrationSection, directory: Path, model: Json
) -> calibration_data.Calibration:
    """Sequences of a run, from its tokenizer; the same in the check and in the task that publishes them.

    Raises:
        InputError: the data cannot be used, or overlaps the recipe's evaluations and that is not accepted.
    """
    from gisp_tasks.export.reload import load_tokenizer

    tokenizer = load_tokenizer(directory, trust_remote_code=recipe.model.trust_remote_code)
    calibration = calibration_data.build(section, tokenizer=tokenizer, vocab_size=int(model["config"]["vocab_size"]))
    evaluated = evaluated_texts(recipe, evaluation_sources(recipe), tokenizer)
    found = contamination.check(section, calibration, evaluated=evaluated, tokenizer=tokenizer)
    return replace(calibration, description={**calibration.description, "contamination": found})


def _compensation_data(
    recipe: Recipe, directory: Path, model: Json, calibration: calibration_data.Calibration
) -> calibration_data.Calibration | None:
    """What least squares reads, where it is asked for."""
    if recipe.pruning.compensation == "none":
        return None
    from gisp_tasks.pruning.compensation import check_sequences

    section = recipe.pruning.compensation_data
    data = build_calibration(recipe, section, directory, model) if section else calibration
    check_sequences(data.set)
    return data


def recipe_yaml(recipe: Recipe) -> bytes:
    """What was asked, without the addresses it is published to: they are not part of a run's identity."""
    import yaml

    return yaml.safe_dump(recipe.identity(), sort_keys=False, allow_unicode=True).encode()


def _check_loss(recipe: Recipe, plan: Plan, directory: Path, calibration: CalibrationSet) -> None:
    """Score the first micro-batch: weights that give no finite loss, or no finite gradients, cannot be pruned."""
    from gisp_tasks.export.reload import load_model
    from gisp_tasks.pruning.importance import ScoringSettings, score

    model = load_model(directory, dtype=recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code)
    # Weighted as if they were the whole set, so that what overflows there overflows here.
    first = calibration.leading(plan.micro_batch_tokens)
    geometry = plan.geometry
    protected = limits_of(recipe.pruning.protect, recipe.pruning.width_multiple, geometry.num_layers).protected
    asked = recipe.importance
    settings = ScoringSettings(protected, asked.normaliser, plan.micro_batch_tokens, score=asked.score)
    try:
        score(model, KeepSets.everything(geometry), geometry, first, settings)
    except NumericsError as error:
        raise InputError(
            f"model {recipe.model.source} in {recipe.model.dtype}: {error}. Only a model whose loss and gradients are "
            f"finite can be scored; check its weights, or try model.dtype: float32"
        ) from None
