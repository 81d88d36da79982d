"""A level's file for llama.cpp: written from its published checkpoint, published, read back and compared."""

import logging
from dataclasses import asdict

from gisp_tasks.pruning.plan import Keys
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.tasks.runtime import Json, Run, scratch

logger = logging.getLogger(__name__)


def export_gguf(recipe: Json, run: Json, level: str, model: Json) -> Json:
    """Publish ``levels/<level>/<level>.gguf`` and, once it was read back and compared, ``levels/<level>/gguf.json``.

    Args:
        recipe: as data.
        run: reference of the plan.
        level: its name.
        model: reference of the level's checkpoint.
    """
    from gisp_tasks.export.gguf import verify_gguf, write_gguf

    this = Run.open(recipe, run)
    key, dtype = Keys.level(level, f"{level}.gguf"), this.recipe.export.gguf
    if this.store.stat(Keys.level(level, "gguf.json")) is None:
        with scratch() as directory:
            checkpoint = this.store.fetch_directory(ArtifactRef.from_dict(model), directory / "model")
            file = directory / f"{level}.gguf"
            write_gguf(checkpoint, file, dtype=dtype, name=f"{this.recipe.name} {level}")
            ref = this.store.put(key, file)
            proof = verify_gguf(checkpoint, this.store.fetch(ref, directory / f"read-{level}.gguf"), dtype=dtype)
        logger.info("%s: %d tensors, weights within %.1e", key, proof.num_tensors, proof.max_difference)
        record = {**asdict(proof), "key": key, "sha256": ref.sha256, "size": ref.size}
        this.publish_json(Keys.level(level, "gguf.json"), record)
    published = this.store.stat(key)
    assert published is not None, "it was published before its proof"
    return published.to_dict()
