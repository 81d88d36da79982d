"""Where base weights come from, pinned: hub commit, registered version, directory, s3:// prefix; safetensors only.

A *model record* names the weights for good: source, revision, and the sha256 of every file. It is JSON-ready, and
`locate` finds the same files again on any machine, or refuses. What a revision is: `stores.origins`.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gisp_tasks.errors import InputError, IntegrityError
from gisp_tasks.recipe import ModelSection
from gisp_tasks.refs import DirectoryListing, sha256_bytes, sha256_file
from gisp_tasks.stores.model_files import check_model_files
from gisp_tasks.stores.origins import BY_FILES, Directory, Hub, Origin, Prefix, is_hub_id, is_wanted
from gisp_tasks.stores.registered_origin import RegisteredModel

logger = logging.getLogger(__name__)


def resolve(section: ModelSection) -> dict[str, Any]:
    """The record of the model that a recipe names.

    Raises:
        InputError: no such model, or as in `check_model_files`.
        RetryableError: the hub, the registry or the store did not answer.
    """
    origin = _origin_of(section.source)
    pinned = origin.pin(section.revision)
    directory = origin.fetch(pinned, with_code=section.trust_remote_code)
    config = _parse_config(directory / "config.json", section)
    check_model_files(directory, config, source=section.source, trust_remote_code=section.trust_remote_code)
    files = {
        name: {"sha256": sha, "size": size}
        for name, (sha, size) in DirectoryListing.of(directory).files.items()
        if is_wanted(name, with_code=section.trust_remote_code)
    }
    return {
        "source": section.source,
        "revision": pinned or sha256_bytes(json.dumps(files, sort_keys=True).encode())[:40],
        "revision_kind": origin.kind if pinned else BY_FILES,
        "trust_remote_code": section.trust_remote_code,
        "licence": _licence_of(directory),
        "config": config,
        "files": files,
    }


def pinned_revision(record: Mapping[str, Any]) -> str | None:
    """The ``model.revision`` with which a recipe names the model of a record for good; None where it has none."""
    revision: str = record["revision"]
    return None if record["revision_kind"] == BY_FILES else revision


def newest_revision(section: ModelSection) -> str:
    """What the model's upstream has now, pinned; nothing is downloaded.

    Raises:
        InputError: there is none, or a model without revisions lies there.
        RetryableError: as in `resolve`.
    """
    pinned = _origin_of(section.source).pin(section.revision)
    if pinned is None:
        raise InputError(
            f"model.source={section.source!r} is to be watched, and was found to be one model without revisions. "
            f"Releases lie below an s3:// prefix as RELEASE/config.json, …, RELEASE/manifest.json; publish them so, or "
            f"remove airflow.watch"
        )
    return pinned


def read_config(section: ModelSection) -> dict[str, Any]:
    """Only the configuration of the model that a recipe names; nothing else is downloaded.

    Raises:
        InputError: as in `resolve`.
        RetryableError: as in `resolve`.
    """
    origin = _origin_of(section.source)
    return _parse_config(origin.fetch_config(origin.pin(section.revision)), section)


def locate(record: Mapping[str, Any]) -> Path:
    """The directory of a resolved model on this machine, fetched if need be, every file verified.

    Raises:
        IntegrityError: the files are not those of the record.
        InputError: the directory is gone.
        RetryableError: as in `resolve`.
    """
    source, pinned = record["source"], pinned_revision(record)
    # A directory that meanwhile has the name of a hub's model is not that model.
    origin = Hub(source) if record["revision_kind"] == Hub.kind else _origin_of(source)
    directory = origin.held(pinned)
    if directory is None or _first_difference(directory, record["files"]):
        directory = origin.fetch(pinned, with_code=record["trust_remote_code"])
    different = _first_difference(directory, record["files"])
    if different:
        raise IntegrityError(
            f"model {source}: the file {different} is no longer the one that this run began with "
            f"(sha256 {record['files'][different]['sha256'][:12]}…); restore it, or start a new run of the recipe"
        )
    return directory


def _origin_of(source: str) -> Origin:
    if source.startswith("s3://"):
        return Prefix(source)
    if source.startswith("models:/"):
        return RegisteredModel(source)
    return Hub(source) if is_hub_id(source) else Directory(source)


def _first_difference(directory: Path, files: Mapping[str, Any]) -> str | None:
    """The first file that is missing or not as recorded."""
    for name, entry in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry["size"] or sha256_file(path) != entry["sha256"]:
            return name
    return None


def _licence_of(directory: Path) -> str | None:
    """The licence that the front matter of a model's README.md states, None if it states none."""
    path = directory / "README.md"
    if not path.is_file():
        return None
    import yaml

    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    try:
        facts = yaml.safe_load(parts[1]) if len(parts) > 1 and not parts[0].strip() else {}
    except yaml.YAMLError:
        return None
    found = facts.get("license") if isinstance(facts, dict) else None
    return str(found) if found else None


def _parse_config(path: Path, section: ModelSection) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"model {section.source}: config.json cannot be read ({error}); give a complete model"
        ) from None
    if not isinstance(config, dict):
        raise InputError(
            f"model {section.source}: config.json holds a {type(config).__name__}, and a mapping was expected; give a "
            f"complete model"
        )
    return config
