"""Where base weights come from: a hub at a commit, a directory, an s3:// prefix; safetensors only.

A *model record* names the weights for good: source, revision, and the sha256 of every file. It is JSON-ready, and
`locate` finds the same files again on any machine, or refuses.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gisp_tasks.errors import InputError, IntegrityError, RetryableError
from gisp_tasks.recipe import ModelSection
from gisp_tasks.refs import DirectoryListing, sha256_bytes, sha256_file
from gisp_tasks.stores.artifacts import open_store
from gisp_tasks.stores.model_files import check_model_files

logger = logging.getLogger(__name__)

_NEEDED = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "LICENSE*", "README.md")
_CODE = ("*.py",)
HUB_COMMIT = "hub commit"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def resolve(section: ModelSection) -> dict[str, Any]:
    """The record of the model that a recipe names.

    Raises:
        InputError: no such model, or as in `check_model_files`.
        RetryableError: the hub or the store did not answer.
    """
    revision = ""
    if section.source.startswith("s3://"):
        directory = _download_prefix(section.source)
    elif _is_hub_id(section.source):
        revision = _hub_commit(section.source, section.revision)
        directory = _hub_snapshot(section.source, revision, patterns=_patterns(section.trust_remote_code))
    else:
        directory = _local_directory(section)
    config = _parse_config(directory / "config.json", section)
    check_model_files(directory, config, source=section.source, trust_remote_code=section.trust_remote_code)
    files = {
        name: {"sha256": sha, "size": size}
        for name, (sha, size) in DirectoryListing.of(directory).files.items()
        if _is_wanted(name, section.trust_remote_code)
    }
    return {
        "source": section.source,
        "revision": revision or sha256_bytes(json.dumps(files, sort_keys=True).encode())[:40],
        "revision_kind": HUB_COMMIT if revision else "digest of the files",
        "trust_remote_code": section.trust_remote_code,
        "licence": _licence_of(directory),
        "config": config,
        "files": files,
    }


def read_config(section: ModelSection) -> dict[str, Any]:
    """Only the configuration of the model that a recipe names; of a hub model, nothing else is downloaded.

    Raises:
        InputError: as in `resolve`.
        RetryableError: as in `resolve`.
    """
    if section.source.startswith("s3://"):
        copied = open_store(section.source).copy_out("config.json", _cache_of(section.source) / "config.json")
        return _parse_config(copied, section)
    if _is_hub_id(section.source):
        commit = _hub_commit(section.source, section.revision)
        return _parse_config(_hub_snapshot(section.source, commit, patterns=("config.json",)) / "config.json", section)
    return _parse_config(_local_directory(section) / "config.json", section)


def locate(record: Mapping[str, Any]) -> Path:
    """The directory of a resolved model on this machine, downloaded if need be, every file verified.

    Raises:
        IntegrityError: the files are not those of the record.
        InputError: the directory is gone.
        RetryableError: the hub or the store did not answer.
    """
    source = record["source"]
    if source.startswith("s3://"):
        directory = _cache_of(source)
        if _first_difference(directory, record["files"]):
            _download_prefix(source)
    elif record["revision_kind"] == HUB_COMMIT:
        directory = _hub_snapshot(source, record["revision"], patterns=_patterns(record["trust_remote_code"]))
    else:
        directory = Path(source).expanduser()
    different = _first_difference(directory, record["files"])
    if different:
        raise IntegrityError(
            f"model {source}: the file {different} is no longer the one that this run began with "
            f"(sha256 {record['files'][different]['sha256'][:12]}…); restore it, or start a new run of the recipe"
        )
    return directory


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


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.match(source)) and not Path(source).exists()


def _local_directory(section: ModelSection) -> Path:
    directory = Path(section.source).expanduser()
    if not directory.is_dir():
        raise InputError(
            f"model.source={section.source!r}: no such directory, and not an 'owner/name' of the hub or an s3:// "
            f"prefix; give the path of a Hugging Face model directory"
        )
    if section.revision is not None:
        raise InputError(
            f"model.revision={section.revision!r} was given for the local directory {section.source}, which has no "
            f"revisions: its files' digests identify it; remove model.revision"
        )
    return directory


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


def _is_wanted(name: str, with_code: bool) -> bool:
    return "/" not in name and not name.startswith(".") and any(map(Path(name).match, _patterns(with_code)))


def _patterns(with_code: bool) -> tuple[str, ...]:
    return (*_NEEDED, *_CODE) if with_code else _NEEDED


def _hub_commit(source: str, revision: str | None) -> str:
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = HfApi().model_info(source, revision=revision, timeout=30).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise InputError(
            f"model.source={source!r}, revision={revision or 'main'}: the hub has no such model or revision, or it is "
            f"private; check the name, or give a token in HF_TOKEN. A local model needs the path of its directory"
        ) from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(
            f"model.source={source!r} is no directory here, so the model hub was asked, which cannot be reached "
            f"({type(error).__name__}); give a local directory or an s3:// prefix, or make the hub reachable"
        ) from None
    if not commit:
        raise InputError(f"model {source}: the hub names no commit for revision {revision or 'main'}; pin one")
    return commit


def _hub_snapshot(source: str, commit: str, *, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=commit, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RetryableError(f"model {source}@{commit}: the download failed: {type(error).__name__}") from error


def _cache_of(uri: str) -> Path:
    cache = Path(os.environ.get("GISP_CACHE", "~/.cache/gisp")).expanduser()
    return cache / "models" / hashlib.sha256(uri.encode()).hexdigest()[:16]


def _download_prefix(uri: str) -> Path:
    """Copy the objects right below an s3:// prefix into the cache of this machine."""
    directory = _cache_of(uri)
    store = open_store(uri)
    names = [key for key in store.keys("") if _is_wanted(key, with_code=True)]
    if not names:
        raise InputError(f"model.source={uri!r}: no model file lies below this prefix; give that of a model directory")
    for stale in directory.glob("*"):
        if stale.name not in names:
            stale.unlink()
    for name in names:
        store.copy_out(name, directory / name)
    return directory
