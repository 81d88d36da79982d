"""Signatures of what a run publishes, where its recipe names a key."""

import logging
from pathlib import Path

from gisp_tasks.errors import IntegrityError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores.signatures import SUFFIX
from gisp_tasks.tasks.runtime import Json, Run, scratch

logger = logging.getLogger(__name__)

MANIFEST_SIGNATURE = Keys.MANIFEST.removesuffix(".json") + SUFFIX


def sign_level(run: Run, record: Json) -> None:
    """Publish the signature of a level's checkpoint beside it, once; nothing where the recipe names no key.

    What is signed is read back from the store: the directory as users download it, with the files that its package
    put there.

    Args:
        run: whose recipe may name a key.
        record: of the level, as in ``level.json``.
    """
    model = record["model"]
    key = model["key"] + SUFFIX
    if not _is_due(run, key):
        return
    with scratch() as directory:
        for name, entry in record["package"].items():
            if name.startswith("model/"):
                uri = f"{run.store.uri}/{Keys.level(record['name'], name)}"
                run.store.fetch(ArtifactRef(uri=uri, **entry), directory / name)
        ref = ArtifactRef(uri=f"{run.store.uri}/{model['key']}/", sha256=model["sha256"], size=model["size"])
        _publish(run, run.store.fetch_directory(ref, directory / "model"), key)


def sign_manifest(run: Run, ref: ArtifactRef) -> None:
    """As `sign_level`, of the manifest."""
    if _is_due(run, MANIFEST_SIGNATURE):
        with scratch() as directory:
            _publish(run, run.store.fetch(ref, directory / ref.name), MANIFEST_SIGNATURE)


def _is_due(run: Run, key: str) -> bool:
    return run.recipe.publish.signing is not None and run.store.stat(key) is None


def _publish(run: Run, path: Path, key: str) -> None:
    from gisp_tasks.stores import signatures

    section = run.recipe.publish.signing
    assert section is not None, "only what is due is signed"
    with scratch() as directory:
        signature = directory / "signature"
        signatures.sign(path, signature, section)
        try:
            run.store.put(key, signature)
        except IntegrityError:
            # Two signatures of the same bytes differ: that of the attempt that was faster stays.
            if run.store.stat(key) is None:
                raise
    logger.info("Signed: %s", key)
