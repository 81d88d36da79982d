"""Signatures of what a run publishes, where its recipe names a key."""

import logging
from pathlib import Path

from gisp_tasks.errors import IntegrityError
from gisp_tasks.pruning.plan import Keys
from gisp_tasks.refs import ArtifactRef
from gisp_tasks.stores.signatures import SUFFIX
from gisp_tasks.tasks.runtime import Run, scratch

logger = logging.getLogger(__name__)

MANIFEST_SIGNATURE = Keys.MANIFEST.removesuffix(".json") + SUFFIX


def sign_directory(run: Run, ref: ArtifactRef, fetched: Path | None = None) -> None:
    """Publish the signature of a published directory beside it, once; nothing where the recipe names no key.

    Args:
        run: whose recipe may name a key.
        ref: the directory.
        fetched: the same directory on this machine; None: it is fetched, if it is not signed yet.
    """
    key = run.store.key_of(ref.uri) + SUFFIX
    if not _is_due(run, key):
        return
    with scratch() as directory:
        path = fetched or run.store.fetch_directory(ref, directory / ref.name)
        _publish(run, path, key)


def sign_manifest(run: Run, ref: ArtifactRef) -> None:
    """As `sign_directory`, of the manifest."""
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
