"""A level's checkpoint: cut from the base model by the removal order, proven by reloading, published."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from gisp_tasks.data import calibration as calibration_data
from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.pruning.families import geometry_of
from gisp_tasks.pruning.objectives import CalibrationSet
from gisp_tasks.pruning.plan import DTYPE_BYTES, Keys
from gisp_tasks.pruning.removal_order import RemovalOrder
from gisp_tasks.pruning.structures import Geometry, KeepSets
from gisp_tasks.recipe import CalibrationSection, ModelSection, level_name
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores import model_source
from gisp_tasks.stores.artifacts import Store, open_store
from gisp_tasks.tasks.child import run_in_child
from gisp_tasks.tasks.compensate import Solutions, solve_projections
from gisp_tasks.tasks.runtime import Json, Run, make_torch_deterministic, scratch
from gisp_tasks.tasks.score import load_order

logger = logging.getLogger(__name__)
_PROOF_TOKENS = 64


def materialize(recipe: Json, run: Json, level: str, order: Json) -> Json:
    """Publish ``levels/<level>/model/`` and, once it was proven, ``reload.json``; return the directory's reference.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: its name.
        order: reference of the removal order after the step that completes the level, or a later one.
    """
    from gisp_tasks.export.huggingface import write_checkpoint

    this = Run.open(recipe, run)
    done = this.store.stat_directory(Keys.level(level, "model"))
    if done and this.store.stat(Keys.level(level, "reload.json")):
        return done.to_dict()
    make_torch_deterministic()
    base = model_source.locate(this.model)
    geometry = this.geometry
    keep = _keep_sets(this, level, order)
    with scratch() as directory:
        out = directory / "model"
        solutions = _compensated(this, keep, base, directory / "compensation")
        replaced = solutions.weights if solutions else {}
        parameters = write_checkpoint(
            base, out, geometry=geometry, keep=keep, dtype=this.recipe.model.dtype, replaced=replaced,
            auto_map=this.recipe.export.auto_map,
        )  # fmt: skip
        expected = geometry.parameters_of(keep) + geometry.other_parameters
        assert parameters == expected, f"{parameters} parameters were written, {expected} planned"
        if solutions:
            record = {**solutions.record(), "by_projection": solutions.projections}
            this.publish_json(Keys.level(level, "compensation.json"), record)
        model = this.store.put_directory(Keys.level(level, "model"), out).to_dict()
        proof = run_in_child(
            "gisp_tasks.tasks.materialize:prove",
            recipe=recipe, run=run, level=level, order=order, model=model,
            replaced={name: str(path) for name, path in replaced.items()},
        )  # fmt: skip
        logger.info("Level %s: %d parameters, logits within %.1e", level, parameters, proof["max_logit_difference"])
        this.publish_json(Keys.level(level, "reload.json"), proof)
        return model


def prove(recipe: Json, run: Json, level: str, order: Json, model: Json, replaced: Json) -> Json:
    """The reload proof of a published checkpoint, in a process that has seen nothing of how it was written.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: its name.
        order: as in `materialize`.
        model: reference of the checkpoint, which is fetched from the store.
        replaced: files of weights by name, that the masked base model gets too.
    """
    from gisp_tasks.export.reload import prove_reload

    this = Run.open(recipe, run)
    make_torch_deterministic()
    with scratch() as directory:
        proof = prove_reload(
            model_source.locate(this.model),
            this.store.fetch_directory(ArtifactRef.from_dict(model), directory / "model"),
            geometry=this.geometry,
            keep=_keep_sets(this, level, order),
            prompt=_calibration_prompt(this),
            replaced={name: Path(path) for name, path in replaced.items()},
        )
    return asdict(proof)


def _keep_sets(run: Run, level: str, order: Json) -> KeepSets:
    return load_order(run, ArtifactRef.from_dict(order)).level(
        run.plan.level(level).sparsity, geometry=run.geometry, width_multiple=run.limits.width_multiple
    )


def _compensated(run: Run, keep: KeepSets, base: Path, out: Path) -> Solutions | None:
    """Least squares on the dense model, where the recipe asks for it."""
    from gisp_tasks.export.reload import load_model

    if run.recipe.pruning.compensation == "none":
        return None
    section = run.recipe.model
    model = load_model(base, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    (solutions,) = solve_projections(model, run.geometry, [keep], run.compensation_set(), out)
    return solutions


def _calibration_prompt(run: Run) -> list[int]:
    """The first tokens of the first calibration sequence."""
    calibration = run.calibration()
    start, end = calibration.spans[0]
    return [int(token) for token in calibration.tokens[start : min(end, start + _PROOF_TOKENS)]]


def materialize_from_order(
    model: str,
    order: str,
    *,
    out: str,
    sparsity: float,
    width_multiple: int,
    dtype: str | None,
    compensate: Path | None = None,
    gguf: str | None = None,
) -> int:
    """Cut a level from a base model and the file of a removal order; returns the parameters written.

    Args:
        model: hub id, directory or s3:// prefix.
        order: the file, or its s3:// address.
        out: a directory that is empty or not there, or an s3:// prefix with nothing below it; there the level is
            published as a run's levels are, and its listing as ``<prefix>.json``.
        sparsity: parameter sparsity.
        width_multiple: rounding of MLP widths.
        dtype: of the weights; None: the model's own.
        gguf: write ``<level>.gguf`` with matrices of this type instead of a Hugging Face directory.
        compensate: a file of token ids to fit least squares on; the model is then loaded as a whole.

    Raises:
        InputError: the order belongs to another model or does not reach that far, ``out`` is not empty, or the tokens
            cannot be used.
    """
    from gisp_tasks.export.huggingface import write_checkpoint

    destination = _destination(out)
    dtypes = ", ".join(DTYPE_BYTES)
    record = model_source.resolve(ModelSection(source=model))
    removal_order, metadata = _load_order(order)
    geometry = geometry_of(record["config"], granularity=metadata["granularity"])
    written_dtype = dtype or record["config"].get("dtype") or record["config"].get("torch_dtype") or "float32"
    if written_dtype not in DTYPE_BYTES:
        raise InputError(f"--dtype {written_dtype}: not a type of weights that is written; allowed are {dtypes}")
    if json.loads(metadata["geometry"]) != asdict(geometry):
        raise InputError(
            f"--order {order} was made from {metadata['base_source']}, whose sizes differ from those of {model}; "
            f"give the model that the order was made from"
        )
    keep = removal_order.level(sparsity, geometry=geometry, width_multiple=width_multiple)
    base = model_source.locate(record)
    if gguf is not None:
        from gisp_tasks.export.gguf import require_supported

        require_supported(record["config"], base)
    with scratch() as directory:
        replaced: Mapping[str, Path] = {}
        if compensate is not None:
            from gisp_tasks.export.reload import load_model

            data = _tokens(compensate, geometry)
            make_torch_deterministic()
            dense = load_model(base, dtype=written_dtype)
            (solutions,) = solve_projections(dense, geometry, [keep], data, directory)
            replaced = solutions.weights
        local = directory / "level" if destination else Path(out)
        checkpoint = local if gguf is None else directory / "checkpoint"
        written = write_checkpoint(
            base, checkpoint, geometry=geometry, keep=keep, dtype=written_dtype, replaced=replaced
        )
        if gguf is not None:
            _write_gguf(checkpoint, local, level_name(sparsity), gguf)
        if destination:
            store, key = destination
            store.put_directory(key, local)
        return written


def _write_gguf(checkpoint: Path, out: Path, name: str, dtype: str) -> None:
    from gisp_tasks.export.gguf import verify_gguf, write_gguf

    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{name}.gguf"
    write_gguf(checkpoint, file, dtype=dtype, name=name)
    verify_gguf(checkpoint, file, dtype=dtype)


def _destination(out: str) -> tuple[Store, str] | None:
    """The store and the key of an s3:// prefix, None for a local directory; neither holds anything yet.

    Raises:
        InputError: it does, or it names a whole bucket.
    """
    if not out.startswith("s3://"):
        directory = Path(out)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"--out {out}: it is not an empty directory; give one that is, or that does not exist yet")
        return None
    parent, _, key = out.rstrip("/").rpartition("/")
    if parent == "s3:/":
        raise InputError(f"--out {out}: a bucket alone was found; give a prefix in it, s3://bucket/prefix")
    store = open_store(parent)
    if next(store.keys(key), None) is not None or store.stat(f"{key}.json") is not None:
        raise InputError(f"--out {out}: something is stored there; give a prefix with nothing below it")
    return store, key


def _load_order(order: str) -> tuple[RemovalOrder, dict[str, str]]:
    if not order.startswith("s3://"):
        path = Path(order)
        if not path.is_file():
            raise InputError(f"--order {order}: no such file; give the removal_order.safetensors of a run")
        return RemovalOrder.load(path)
    parent, _, key = order.rpartition("/")
    with scratch() as directory:
        try:
            path = open_store(parent).copy_out(key, directory / key)
        except IntegrityError:
            raise InputError(f"--order {order}: no such object; give the removal_order.safetensors of a run") from None
        return RemovalOrder.load(path)


def _tokens(path: Path, geometry: Geometry) -> CalibrationSet:
    """All of a token file."""
    section = CalibrationSection(
        dataset="tokens", path=str(path), sequences=1_000_000, sequence_length=geometry.max_positions
    )
    return calibration_data.build(section, tokenizer=None, vocab_size=geometry.vocab_size).set
